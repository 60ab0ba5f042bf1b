"""The event stream of a request. Responses and progress bars are views of it."""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.domain.errors import StepserveError
from stepserve.domain.timings import Timings


@dataclass(frozen=True)
class TrajectoryStep:
    """One recorded step of one image, as files.

    Args:
        step: from 1.
        timestep: as the scheduler counts it.
        x_t: what the step began with.
        x_0: the clean sample that was predicted of it.

    A file is empty where there is none: the model's own safety checker withheld it, or the
    network's output does not tell x_0.
    """

    step: int
    timestep: float
    x_t: bytes
    x_0: bytes

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return len(self.x_t) + len(self.x_0)


@dataclass(frozen=True)
class EncodedTrajectory:
    """The trajectory of one image: one safetensors file, or images step by step.

    Args:
        tensors: the file; empty where there are images.
        steps: those with images.
        media_type: of the file or files.
    """

    media_type: str
    tensors: bytes = b""
    steps: tuple[TrajectoryStep, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return len(self.tensors) + sum(step.size_bytes for step in self.steps)


@dataclass(frozen=True)
class EncodedImage:
    """One finished image as a file, with the seed that makes this image again.

    `content_filtered`: the model's own safety checker withheld it, and `data` is empty.
    `size`: as `WIDTHxHEIGHT` in pixels, or empty where it is withheld.
    `trajectory`: the steps to it, where the request wants them and it is not withheld.
    """

    data: bytes
    media_type: str
    seed: int
    content_filtered: bool = False
    size: str = ""
    trajectory: EncodedTrajectory | None = None


@dataclass(frozen=True)
class Accepted:
    """The request was accepted; `position` requests were accepted before it and have not ended.

    `expected_s`: estimated seconds until it is finished, under the current load.
    """

    request_id: str
    position: int
    expected_s: float | None


@dataclass(frozen=True)
class Started:
    """The pipeline call began."""

    request_id: str


@dataclass(frozen=True)
class StepFinished:
    """Denoising step `step` of `steps` is done."""

    request_id: str
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """The images as predicted at step `step` of `steps`.

    `index` counts the previews of a request from 0. The files have no parameters in them.
    """

    request_id: str
    index: int
    step: int
    steps: int
    images: tuple[EncodedImage, ...]


@dataclass(frozen=True)
class CutPrompt:
    """A text encoder that read the first `limit` of the `tokens` of a request's field only.

    Another encoder read all of it.
    """

    field: str
    encoder: str
    tokens: int
    limit: int


@dataclass(frozen=True)
class Finished:
    """All images are made; `fingerprint` is the short one of the model that made them."""

    request_id: str
    images: tuple[EncodedImage, ...]
    timings: Timings
    fingerprint: str = ""
    cut_prompts: tuple[CutPrompt, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The request ended without images: it was refused, failed, expired or was cancelled."""

    request_id: str
    error: StepserveError


Event = Accepted | Started | StepFinished | Preview | Finished | Failed
Outcome = Finished | Failed
