"""Checks of what a request brings along against what its task takes with its model. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stepserve.domain.checks.wording import did_you_mean, digits, shown
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities, StepRange
from stepserve.domain.requests import GenerationRequest, Hires, ReferenceUse
from stepserve.domain.tasks import NONE, Count, Role, Task, TaskInputs, misfits

MAX_HIRES_SCALE = 4.0
"""Of one enlargement: of a larger one hardly anything is left to refine."""

MAX_REFERENCE_SCALE = 5.0
"""With a larger one nothing is left of the prompt, nor of an image."""


def check_inputs(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Return if the inputs of a request are those that its task takes.

    Raises:
        InvalidRequestError: names the first role with too few or too many, or a value out of
            bounds.
    """
    check_counts(request.task, model, request.given())
    _check_class(request, model)
    if request.strength is not None:
        _check_strength(request.strength, request.num_inference_steps)
    if request.hires is not None:
        _check_enlarged(request, request.hires, model)
        _check_refinement(request.hires, model.steps_of(request.scheduler))
    _check_noise_level(request.noise_level, model)
    for index, use in enumerate(request.references):
        _check_reference(f"references[{index}]", use, model)


def check_counts(task: Task, model: ModelCapabilities, given: Mapping[Role, int]) -> None:
    """Return if a task of the model takes so many inputs of each role.

    Raises:
        InvalidRequestError: the model does not do the task, or names the first role with too few
            or too many.
    """
    if task not in model.tasks:
        known = ", ".join(model.tasks)
        message = f"model {model.id!r} does not do {task} (it does: {known})"
        raise InvalidRequestError(message, "model")
    inputs = model.inputs_of(task)
    for role in misfits(inputs, given):
        what = f"{task} with model {model.id!r}"
        message = _input_message(what, role, inputs.get(role, NONE), given.get(role, 0))
        raise InvalidRequestError(f"{message} (it takes: {describe_inputs(inputs)})", role)


def _input_message(what: str, role: Role, count: Count, given: int) -> str:
    if count.most == 0:
        return f"{role} must be left out: {what} does not take {'one' if given == 1 else 'any'}"
    if role is Role.PROMPT:
        return f"prompt is empty: {what} requires one"
    if given == 0 and count.most == 1:
        return f"{role} is required by {what}"
    return f"{role} must be {count.describe()} for {what}, got {given}"


def describe_inputs(inputs: TaskInputs) -> str:
    """For messages: `prompt, image (1 to 16), mask (optional)`."""
    return ", ".join(_describe_input(role, count) for role, count in inputs.items()) or "no input"


def _describe_input(role: Role, count: Count) -> str:
    if count.most > 1:
        return f"{role} ({count.describe()})"
    return f"{role}" if count.least else f"{role} (optional)"


def class_number(label: int | str | None, model: ModelCapabilities) -> int | None:
    """Return the number of a class that is given by its number or its name.

    Raises:
        InvalidRequestError: no class of the model has that name, or several have.
    """
    if not isinstance(label, str) or not model.classes.count:
        # Of a model without classes it is refused for being there.
        return 0 if isinstance(label, str) else label
    if label.isascii() and label.isdigit():
        return int(label[:MOST_DIGITS])
    numbers = model.classes.numbers_of(label)
    if len(numbers) == 1:
        return numbers[0]
    raise InvalidRequestError(_name_message(label, numbers, model), Role.CLASS_LABEL)


MOST_DIGITS = 9
"""Of a class's number: no model has as many classes."""


def _name_message(label: str, numbers: Sequence[int], model: ModelCapabilities) -> str:
    if numbers:
        listed = ", ".join(map(str, numbers))
        return f"class_label {shown(label)} is the name of several classes: send one of {listed}"
    names = [name for names in model.classes.names.values() for name in names]
    if not names:
        return (
            f"class_label {shown(label)} is no number: the classes of model {model.id!r} have no "
            f"names; send 0 to {model.classes.count - 1}"
        )
    return (
        f"class_label {shown(label)} is not known{did_you_mean(label, names)} (0 to "
        f"{model.classes.count - 1}, or a name that GET /v1/models/{model.id} lists)"
    )


def _check_class(request: GenerationRequest, model: ModelCapabilities) -> None:
    label, count = request.class_label, model.classes.count
    if label is not None and not 0 <= label < count:
        message = f"class_label must be 0 to {count - 1}, got {digits(label)}"
        raise InvalidRequestError(message, Role.CLASS_LABEL)


def _check_noise_level(noise_level: int | None, model: ModelCapabilities) -> None:
    most = model.max_noise_level or 0
    if noise_level is not None and not 0 <= noise_level <= most:
        message = f"noise_level must be 0 to {most}, got {digits(noise_level)}"
        raise InvalidRequestError(message, Role.NOISE_LEVEL)


def _check_reference(place: str, use: ReferenceUse, model: ModelCapabilities) -> None:
    if not 0 <= use.scale <= MAX_REFERENCE_SCALE:  # NaN is not: every comparison with it is false
        message = f"{place}.scale must be 0 to {MAX_REFERENCE_SCALE:g}, got {use.scale}"
        raise InvalidRequestError(message, f"{place}.scale")
    known, listed = model.ip_adapters, ", ".join(model.ip_adapters)
    if not use.adapter and len(known) > 1:
        message = f"{place}.adapter is required: model {model.id!r} has several ({listed})"
        raise InvalidRequestError(message, f"{place}.adapter")
    if use.adapter and use.adapter not in known:
        raise InvalidRequestError(
            f"{place}.adapter {shown(use.adapter)} is not known{did_you_mean(use.adapter, known)} "
            f"(known: {listed})",
            f"{place}.adapter",
        )


def _check_strength(strength: float, steps: int, within: str = "") -> None:
    """`within` begins the names of fields of an object, such as `hires.`."""
    field = f"{within}strength"
    if not 0 < strength <= 1:
        message = f"{field} must be over 0 and at most 1, got {strength}"
        raise InvalidRequestError(message, field)
    if int(steps * strength) < 1:
        raise InvalidRequestError(
            f"{field} {strength} of {steps} steps leaves no step: with "
            f"{within}num_inference_steps {steps} it must be at least "
            f"{math.ceil(10_000 / steps) / 10_000:g}",
            field,
        )


def _check_enlarged(request: GenerationRequest, hires: Hires, model: ModelCapabilities) -> None:
    field, sizes = "hires.scale", model.sizes
    if not 1 < hires.scale <= MAX_HIRES_SCALE:  # NaN ends here too
        message = f"{field} must be over 1 and at most {MAX_HIRES_SCALE:g}, got {hires.scale}"
        raise InvalidRequestError(message, field)
    what = f"{field} {hires.scale:g} makes {request.final_size} of size {request.size}"
    if request.final_size == request.size:
        message = f"{what}, which is no larger: sides of {model.id!r} go in steps of {sizes.step}"
        raise InvalidRequestError(message, field)
    if not (sizes.accepts(hires.width) and sizes.accepts(hires.height)):
        most = sizes.maximum / max(request.width, request.height)
        instead = f"at most {math.floor(100 * most) / 100:g}, or " if most > 1 else ""
        raise InvalidRequestError(
            f"{what}, and each side must be {sizes.describe()} with {model.id!r}: choose "
            f"{instead}a smaller size",
            field,
        )


def _check_refinement(hires: Hires, limits: StepRange) -> None:
    field, steps = "hires.num_inference_steps", hires.num_inference_steps
    if not limits.minimum <= steps <= limits.maximum:
        message = f"{field} must be {limits.minimum} to {limits.maximum}, got {digits(steps)}"
        raise InvalidRequestError(message, field)
    _check_strength(hires.strength, steps, "hires.")
