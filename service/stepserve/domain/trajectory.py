"""The trajectory of an image: its noisy and its predicted clean samples, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class TrajectoryFormat(StrEnum):
    """How a trajectory is returned."""

    IMAGES = "images"
    """Decoded, as files of the request's output format."""

    SAFETENSORS = "safetensors"
    """As the scheduler had them, in one file."""


@dataclass(frozen=True)
class TrajectoryRequest:
    """That a request wants the trajectories of its images.

    Args:
        format: how they are returned.
        every: of so many steps one is recorded, the first of all among them.
    """

    format: TrajectoryFormat = TrajectoryFormat.IMAGES
    every: int = 1

    def records(self, step: int) -> bool:
        """Whether step `step` (from 1) is recorded."""
        return (step - 1) % self.every == 0

    def recorded(self, steps: int) -> int:
        """How many of `steps` steps are recorded."""
        return math.ceil(steps / self.every)


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
