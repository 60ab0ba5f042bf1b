"""Which classes a class-conditional model has, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepserve.domain.models import ClassLabels
from stepserve.pipelines.errors import ModelLoadError

CLASS_LABELS = "class_labels"
"""The argument of a call; in a folder's `stepserve.json`: a list of names, or names by number."""

# What denoisers call the number of their classes; DiT's table has one more row, for none of them.
_COUNTS = ("num_class_embeds", "num_embeds_ada_norm")


def class_count(denoiser: Any) -> int:
    """How many classes a denoiser can be told; 0 where it cannot be told any."""
    config = getattr(denoiser, "config", None)
    return next((int(n) for name in _COUNTS if (n := getattr(config, name, None))), 0)


def read_classes(pipeline: Any, denoiser: Any, said: object) -> ClassLabels:
    """The classes of a pipeline.

    Args:
        pipeline: DiT's has names, as `labels`.
        denoiser: which is told the class.
        said: names in the folder's manifest, which go before the pipeline's, or None.

    Raises:
        ModelLoadError: the manifest names classes that the model does not have.
    """
    count = class_count(denoiser)
    names = _labels_of(pipeline) if said is None else _said_names(said)
    beyond = [number for number in names if not 0 <= number < count]
    if beyond:
        raise ModelLoadError(
            f"{CLASS_LABELS} names class {beyond[0]}; its denoiser has {count} classes, from 0 on"
        )
    return ClassLabels(count, dict(sorted(names.items())))


def _labels_of(pipeline: Any) -> dict[int, tuple[str, ...]]:
    labels: Mapping[str, int] = getattr(pipeline, "labels", None) or {}
    names: dict[int, tuple[str, ...]] = {}
    for name, number in labels.items():
        names[number] = (*names.get(number, ()), name)
    return names


def _said_names(said: object) -> dict[int, tuple[str, ...]]:
    by_number = dict(enumerate(said)) if isinstance(said, list) else said
    try:
        if not isinstance(by_number, dict):
            raise TypeError
        return {int(number): _names(value) for number, value in by_number.items()}
    except (TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{CLASS_LABELS} must be a list of names, or names by number, such as "
            '["cat", "dog"] or {"7": ["cat", "kitten"]}'
        ) from error


def _names(value: object) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return tuple(names)
