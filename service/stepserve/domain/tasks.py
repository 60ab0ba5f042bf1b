"""What a request makes of what: tasks, and how many inputs of each role a model takes for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Task(StrEnum):
    """What is made of what."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"
    """From a noisy version of one image, by as much as a strength says."""

    INPAINTING = "inpainting"
    """A part of an image is made anew."""

    EDIT = "edit"
    """A prompt says what to do with one or several images."""

    UPSCALING = "upscaling"
    """One image becomes a larger one."""

    CLASS_TO_IMAGE = "class-to-image"
    UNCONDITIONAL = "unconditional"
    """Nothing is asked for but an image."""


class Role(StrEnum):
    """What an input of a request is for. Each is named as the field of the HTTP API."""

    PROMPT = "prompt"
    CLASS_LABEL = "class_label"
    IMAGE = "image"
    MASK = "mask"
    STRENGTH = "strength"
    IMAGE_GUIDANCE = "image_guidance_scale"
    NOISE_LEVEL = "noise_level"
    CONTROL = "controls"
    REFERENCE = "references"
    HIRES = "hires"


MAX_IMAGES = 16
"""That a request begins with, as OpenAI has it."""


@dataclass(frozen=True)
class Count:
    """How many inputs of one role: from `least` to `most`."""

    least: int = 0
    most: int = 1

    def accepts(self, given: int) -> bool:
        """Whether so many may be given."""
        return self.least <= given <= self.most

    def describe(self) -> str:
        """For messages: `1`, or `1 to 16`."""
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


NONE, ONE, OPTIONAL = Count(0, 0), Count(1, 1), Count(0, 1)

TaskInputs = Mapping[Role, Count]
"""By role, how many inputs a task takes; none of the roles that are not there."""


def fitting_task(
    candidates: Iterable[Task], offered: Mapping[Task, TaskInputs], given: Mapping[Role, int]
) -> Task | None:
    """The first of the candidates whose inputs fit best what is given, or None if none is offered.

    Args:
        candidates: in order of preference.
        offered: tasks of a model, with their inputs.
        given: how many inputs of each role a request brings.
    """
    tasks = [task for task in candidates if task in offered]
    return min(tasks, key=lambda task: len(misfits(offered[task], given)), default=None)


def misfits(inputs: TaskInputs, given: Mapping[Role, int]) -> list[Role]:
    """The roles of which too few or too many inputs are given."""
    return [role for role in Role if not inputs.get(role, NONE).accepts(given.get(role, 0))]
