"""Checks of what a request brings along against what its task takes with its model. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import NONE, Count, Role, Task, TaskInputs, misfits


def check_inputs(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Return if the inputs of a request are those that its task takes.

    Raises:
        InvalidRequestError: names the first role with too few or too many, or a value out of
            bounds.
    """
    check_counts(request.task, model, request.given())
    _check_strength(request)


def check_counts(task: Task, model: ModelCapabilities, given: Mapping[Role, int]) -> None:
    """Return if a task of the model takes so many inputs of each role.

    Raises:
        InvalidRequestError: the model does not do the task, or names the first role with too few
            or too many.
    """
    if task not in model.tasks:
        known = ", ".join(model.tasks)
        message = f"task {task} is not supported by model {model.id!r} (supported: {known})"
        raise InvalidRequestError(message, "task")
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


def _check_strength(request: GenerationRequest) -> None:
    strength, steps = request.strength, request.num_inference_steps
    if strength is None:
        return
    if not 0 < strength <= 1:
        message = f"strength must be over 0 and at most 1, got {strength}"
        raise InvalidRequestError(message, "strength")
    if int(steps * strength) < 1:
        raise InvalidRequestError(
            f"strength {strength} of {steps} steps leaves no step: with num_inference_steps "
            f"{steps} it must be at least {math.ceil(10_000 / steps) / 10_000:g}",
            "strength",
        )
