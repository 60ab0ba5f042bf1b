"""The trajectories of images, as responses have them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Literal

from pydantic import BaseModel, Field

from stepserve.domain.events import EncodedTrajectory, TrajectoryStep
from stepserve.domain.requests import TrajectoryFormat

Link = Callable[[bytes, str], Awaitable[str]]
"""Keeps a file of a media type, and returns where it is."""


class FileResponse(BaseModel):
    """One file, as the images are returned: in the response, or as a link."""

    b64_json: str | None = Field(default=None, description="The file, base64.")
    url: str | None = Field(default=None, description="Where it is, until the link expires.")


class TrajectoryStepResponse(BaseModel):
    """One recorded step."""

    step: int = Field(description="From 1; schedulers such as Heun's make two of a denoising step.")
    timestep: float = Field(description="As the scheduler counts it.")
    x_t: FileResponse | None = Field(
        default=None,
        description="What the step began with. Absent where the model's safety checker withheld "
        "it.",
    )
    x_0: FileResponse | None = Field(
        default=None,
        description="The clean sample that was predicted of it. Absent where it was withheld, or "
        "the network's output does not tell it.",
    )


class TrajectoryResponse(BaseModel):
    """The steps that led to an image."""

    format: Literal["images", "safetensors"]
    steps: list[TrajectoryStepResponse] | None = Field(default=None, description="With `images`.")
    file: FileResponse | None = Field(
        default=None,
        description="With `safetensors`: one file with the tensors `x_t`, `x_0`, `timesteps`, "
        "`steps` and `latents`.",
    )


async def trajectory_response(
    trajectory: EncodedTrajectory, link: Link | None
) -> TrajectoryResponse:
    """Return a trajectory as it is sent.

    Args:
        trajectory: of one image.
        link: makes links; None where files are to be in the response.

    Raises:
        ResultsUnavailableError: they are to be links, and cannot be kept.
    """
    media_type = trajectory.media_type
    if trajectory.tensors:
        file = await _file(trajectory.tensors, media_type, link)
        return TrajectoryResponse(format=TrajectoryFormat.SAFETENSORS.value, file=file)
    steps = [await _step(step, media_type, link) for step in trajectory.steps]
    return TrajectoryResponse(format=TrajectoryFormat.IMAGES.value, steps=steps)


async def _step(step: TrajectoryStep, media_type: str, link: Link | None) -> TrajectoryStepResponse:
    return TrajectoryStepResponse(
        step=step.step,
        timestep=step.timestep,
        x_t=await _file(step.x_t, media_type, link),
        x_0=await _file(step.x_0, media_type, link),
    )


async def _file(data: bytes, media_type: str, link: Link | None) -> FileResponse | None:
    if not data:
        return None
    if link is None:
        return FileResponse(b64_json=b64encode(data).decode("ascii"))
    return FileResponse(url=await link(data, media_type))
