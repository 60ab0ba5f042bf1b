"""Checks of a request's controls against those of its model. Pure."""

from __future__ import annotations

from stepserve.domain.checks.wording import did_you_mean, shown
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import AS_IT_IS, Control, ModelCapabilities, Preprocessor
from stepserve.domain.requests import ControlUse, GenerationRequest

MAX_CONTROL_SCALE = 10.0
"""No network gives a usable image with a larger scale."""


def check_controls(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Return if the model has the controls of a request, and takes what is said of each.

    Their number is checked with that of all inputs.

    Raises:
        InvalidRequestError: names the first value that is wrong, and what the model takes.
    """
    known = {control.name: control for control in model.controls}
    listed = ", ".join(known) or "none"
    for index, use in enumerate(request.controls):
        place = f"controls[{index}]"
        if not use.name:
            raise _wrong(f"{place}.name", f"is required: model {model.id!r} has {listed}")
        if use.name not in known:
            meant = did_you_mean(use.name, tuple(known))
            what = f"{shown(use.name)} is not known{meant} (known: {listed})"
            raise _wrong(f"{place}.name", what)
        _check_scale(place, use, known[use.name])
        _check_interval(place, use, known[use.name])
        _check_preprocessor(place, use)


def _check_scale(place: str, use: ControlUse, control: Control) -> None:
    field = f"{place}.scale"
    if not 0 <= use.scale <= MAX_CONTROL_SCALE:  # NaN ends here too
        raise _wrong(field, f"must be 0 to {MAX_CONTROL_SCALE:g}, got {use.scale}")
    if use.scale != 1 and not control.takes_scale:
        raise _wrong(field, f"must be 1, got {use.scale}: {shown(use.name)} takes no other")


def _check_interval(place: str, use: ControlUse, control: Control) -> None:
    if not 0 <= use.start < 1:
        raise _wrong(f"{place}.start", f"must be at least 0 and less than 1, got {use.start}")
    if not use.start < use.end <= 1:
        limits = f"must be over start ({use.start}) and at most 1"
        raise _wrong(f"{place}.end", f"{limits}, got {use.end}")
    if (use.start, use.end) != (0, 1) and not control.takes_interval:
        field, only, got = ("start", 0, use.start) if use.start else ("end", 1, use.end)
        raise _wrong(
            f"{place}.{field}",
            f"must be {only}, got {got}: {shown(use.name)} is a {control.kind}, which steers at "
            "every step",
        )


def _check_preprocessor(place: str, use: ControlUse) -> None:
    known = [*Preprocessor, AS_IT_IS]
    if use.preprocessor and use.preprocessor not in known:
        raise _wrong(
            f"{place}.preprocessor",
            f"must be one of {', '.join(known)}, got {shown(use.preprocessor)}",
        )


def _wrong(field: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {what}", field)
