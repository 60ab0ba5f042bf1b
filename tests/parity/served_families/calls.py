"""HTTP calls as data: what a client sends to reach a family, and what the plain pipeline is told.

Both are templates over the same inputs: an input stands for a text, a number or an image of one
request, which a body holds as a `data:` URL and a plain call as an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"

Template = Mapping[str, Any]


class Input(StrEnum):
    """What differs from request to request, beside what every request says."""

    PROMPT = "prompt"
    EDIT_IN_JSON = "prompt in the form of Bria's"
    IMAGE = "image"
    SECOND_IMAGE = "second image"
    MASK = "mask"
    STRENGTH = "strength"
    CLASS_LABEL = "class label"
    IMAGE_GUIDANCE = "image guidance scale"
    CONTROL = "control"
    SECOND_CONTROL = "second control"
    REFERENCE = "reference"
    SECOND_REFERENCE = "second reference"
    SCALE = "scale of what steers, or of an adapter"


def save_whole(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Write the pipeline's folder; it is all that an operator gives."""
    pipeline.save_pretrained(folder)
    return {}


def read_folder(pipeline: Any, folder: Path) -> Any:
    """The folder as plain diffusers reads it."""
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def built(pipeline: Any, folder: Path) -> Any:
    """The pipeline that was built, where the folder has a part of it only."""
    return pipeline


@dataclass(frozen=True)
class HttpCall:
    """How one family is reached.

    Args:
        url: of a POST.
        body: JSON, beside model, size, steps, scales and seed.
        arguments: of the plain pipeline's call, beside these.
        save: writes the model's folder, and returns the operator's settings besides it.
        read: the plain pipeline that images are compared with, from the one that was built and the
            folder.
        prepare: tells the plain pipeline what is no argument of a call.
        side_px: of the image; 0 is the family's own, or what the folder says.
    """

    url: str
    body: Template
    arguments: Template
    save: Callable[[Any, Path], dict[str, Any]] = field(default=save_whole)
    read: Callable[[Any, Path], Any] = field(default=read_folder)
    prepare: Callable[[Any, Mapping[Input, Any]], None] = field(default=lambda *_: None)
    side_px: int = 0

    def describe(self) -> str:
        """For the table in the docs: `POST /v1/images/edits` with its fields."""
        fields = ", ".join(self.body)
        with_fields = f" with `{fields}`" if fields else ""
        return f"`POST {self.url}`{with_fields}"


def fill(template: Any, values: Mapping[Input, Any]) -> Any:
    """The template with each input replaced by its value, at any depth."""
    match template:
        case Input():
            return values[template]
        case Mapping():
            return {name: fill(value, values) for name, value in template.items()}
        case list():
            return [fill(value, values) for value in template]
    return template
