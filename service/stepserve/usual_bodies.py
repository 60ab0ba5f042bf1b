"""What to ask a model of a running service for, whatever it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIVEN_BY_ALL = ("prompt", "class_label")
"""What a small request can bring by itself; an image is none of it."""


def usual_body(model: Mapping[str, Any], prompt: str) -> dict[str, Any] | None:
    """A body for `POST /v1/images/generations`; None where the model needs an image.

    Args:
        model: as `GET /v1/models/{id}` tells it.
        prompt: what to ask for, where it takes a prompt.
    """
    for inputs in model["inputs"].values():
        required = {role for role, count in inputs.items() if count["least"]}
        if required <= set(GIVEN_BY_ALL):
            values = {"prompt": prompt, "class_label": 0}
            return {name: value for name, value in values.items() if name in required}
    return None
