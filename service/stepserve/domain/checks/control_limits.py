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
    for use in request.controls:
        if not use.name:
            raise _wrong(f"a name is required: model {model.id!r} has {', '.join(known) or 'none'}")
        if use.name not in known:
            raise _wrong(
                f"{shown(use.name)} is not known{did_you_mean(use.name, tuple(known))} "
                f"(known: {', '.join(known) or 'none'})"
            )
        _check_scale(use, known[use.name])
        _check_interval(use, known[use.name])
        _check_preprocessor(use)


def _check_scale(use: ControlUse, control: Control) -> None:
    if not 0 <= use.scale <= MAX_CONTROL_SCALE:  # NaN ends here too
        raise _wrong(
            f"the scale of {shown(use.name)} must be 0 to {MAX_CONTROL_SCALE:g}, got {use.scale}"
        )
    if use.scale != 1 and not control.takes_scale:
        raise _wrong(
            f"the scale of {shown(use.name)} must be 1, got {use.scale}: it takes no other"
        )


def _check_interval(use: ControlUse, control: Control) -> None:
    if not 0 <= use.start < 1:
        limits = "must be at least 0 and less than 1"
        raise _wrong(f"the start of {shown(use.name)} {limits}, got {use.start}")
    if not use.start < use.end <= 1:
        limits = f"must be over its start ({use.start}) and at most 1"
        raise _wrong(f"the end of {shown(use.name)} {limits}, got {use.end}")
    if (use.start, use.end) != (0, 1) and not control.takes_interval:
        raise _wrong(
            f"start and end of {shown(use.name)} must be 0 and 1, got {use.start} and {use.end}: "
            f"a {control.kind} steers at every step"
        )


def _check_preprocessor(use: ControlUse) -> None:
    known = [*Preprocessor, AS_IT_IS]
    if use.preprocessor and use.preprocessor not in known:
        raise _wrong(
            f"the preprocessor of {shown(use.name)} must be one of {', '.join(known)}, got "
            f"{shown(use.preprocessor)}"
        )


def _wrong(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"controls: {what}", "controls")
