"""Checks of what a request wants to see of its steps: none may hold more memory than is allowed."""

from __future__ import annotations

import math

from stepserve.domain.checks.wording import digits
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import GenerationRequest, TrajectoryFormat, TrajectoryRequest

MAX_EVERY = 1000
MAX_SHOWN_STEPS = 50
"""Each decodes every image twice."""

MAX_TRAJECTORY_BYTES = 64 * 2**20
"""Of all images of a request, before they become files."""

BYTES_PER_PIXEL = 3


def check_trajectory(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Return if the trajectory that a request wants can be recorded, as far as its fields tell.

    Raises:
        InvalidRequestError: names the field out of bounds, its value and its limit.
    """
    wanted = request.trajectory
    if wanted is None:
        return
    if not 1 <= wanted.every <= MAX_EVERY:
        got = digits(wanted.every)
        message = f"trajectory.every must be 1 to {MAX_EVERY}, got {got}"
        raise InvalidRequestError(message, "trajectory.every")
    if request.hires is not None:
        message = "trajectory and hires exclude each other: leave one of them out"
        raise InvalidRequestError(message, "trajectory")
    if wanted.format is TrajectoryFormat.IMAGES and not model.previews:
        raise InvalidRequestError(
            f"trajectory.format must be 'safetensors', got 'images': the steps of model "
            f"{model.id!r} cannot be shown",
            "trajectory.format",
        )
    check_shown_steps(request, request.expected_steps)


def check_shown_steps(request: GenerationRequest, steps: int) -> None:
    """Return if so many steps are few enough, where their images are wanted.

    Args:
        request: with or without a trajectory.
        steps: calls of the denoiser, of which some schedulers make two a step.

    Raises:
        InvalidRequestError: `trajectory.every` is too small, or the images are too large.
    """
    wanted = request.trajectory
    if wanted is None or wanted.format is not TrajectoryFormat.IMAGES:
        return
    if wanted.recorded(steps) > MAX_SHOWN_STEPS:
        raise _too_often(
            wanted,
            math.ceil(steps / MAX_SHOWN_STEPS),
            f"images of at most {MAX_SHOWN_STEPS} steps are returned, and there are {steps}",
        )
    check_trajectory_bytes(wanted, steps, shown_step_bytes(request))


def shown_step_bytes(request: GenerationRequest) -> int:
    """What the images of x_t and x_0 of one step take in memory."""
    return 2 * request.n * request.width * request.height * BYTES_PER_PIXEL


def check_trajectory_bytes(wanted: TrajectoryRequest, steps: int, step_bytes: int) -> int:
    """Return the bytes of a trajectory, of which each recorded step takes `step_bytes`.

    Raises:
        InvalidRequestError: they are too many.
    """
    size_bytes = wanted.recorded(steps) * step_bytes
    if size_bytes <= MAX_TRAJECTORY_BYTES:
        return size_bytes
    limit = f"the limit is {MAX_TRAJECTORY_BYTES} bytes"
    fitting = MAX_TRAJECTORY_BYTES // step_bytes
    if not fitting:
        raise InvalidRequestError(
            f"trajectory cannot be recorded: one step takes {step_bytes} bytes, {limit}; send a "
            "smaller n or size",
            "trajectory",
        )
    raise _too_often(
        wanted,
        math.ceil(steps / fitting),
        f"{wanted.recorded(steps)} recorded steps take {size_bytes} bytes, {limit}",
    )


def _too_often(wanted: TrajectoryRequest, least: int, why: str) -> InvalidRequestError:
    message = f"trajectory.every must be at least {least}, got {wanted.every}: {why}"
    return InvalidRequestError(message, "trajectory.every")
