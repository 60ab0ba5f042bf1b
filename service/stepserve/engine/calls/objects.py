"""Looking into objects that hold tensors: output objects of models, and caches they write into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import optree
import torch
from optree import PyTreeSpec

OUTPUTS = "stepserve.outputs"
"""The namespace in which optree knows how to look into objects."""

# Output parts that every call may be handed as they are: immutable, and rarely about one row.
HARMLESS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
# Only lists with one entry a row are values.
VALUES = (torch.Tensor, list, *HARMLESS)


class UnsplittableError(TypeError):
    """The output of a stacked forward has a part of which it is unknown whose it is."""


def flatten_output(
    output: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], PyTreeSpec]:
    """Every value in an output, and the structure of the containers and objects around them.

    Raises:
        UnsplittableError: there is an object in it that cannot be looked into.
    """
    leaves, structure = optree.tree_flatten(output, is_leaf, none_is_leaf=True, namespace=OUTPUTS)
    objects = {type(leaf): leaf for leaf in leaves if not isinstance(leaf, VALUES)}
    if not objects:
        return leaves, structure
    for value in objects.values():
        _register(value)
    return flatten_output(output, is_leaf)


def _register(value: Any) -> None:
    """Have objects of this type looked into from now on."""
    if isinstance(value, tuple) or callable(value) or not hasattr(value, "__dict__"):
        raise UnsplittableError(f"an object of type {type(value).__name__}")
    # Another thread may have come first.
    with suppress(ValueError):
        optree.register_pytree_node(type(value), _parts, _rebuild, namespace=OUTPUTS)


def _parts(value: Any) -> tuple[Iterable[Any], tuple[Any, tuple[Any, ...]]]:
    """What an output object holds, and what it takes to build one like it."""
    if not isinstance(value, dict):
        parts = vars(value)
    elif is_dataclass(value):
        # The output classes of diffusers and transformers; as dicts they lack fields that are None.
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        parts = value
    return parts.values(), (value, tuple(parts))


def _rebuild(like: Any, parts: Iterable[Any]) -> Any:
    value, names = like
    named = dict(zip(names, parts, strict=True))
    if isinstance(value, dict) and is_dataclass(value):
        return type(value)(**named)
    # Such as a latent distribution: a copy with other attributes, whatever was derived before.
    other = copy.copy(value)
    if other is value:
        raise UnsplittableError(f"an object of type {type(value).__name__} that copies to itself")
    (other if isinstance(value, dict) else vars(other)).update(named)
    return other
