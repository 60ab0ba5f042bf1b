"""Stacking the arguments of several calls for one forward, and splitting its output again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch

from service.engine.call import Call
from service.engine.leaves import LeafKind, Path

# Output parts that every call may be handed as they are: immutable, and rarely about one row.
HARMLESS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class UnsplittableError(TypeError):
    """The output of a stacked forward has a part of which nobody knows whose it is."""


def stack(calls: Sequence[Call]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one forward that serves all `calls`, which have equal keys.

    A single call keeps its arguments untouched, so that it is exactly the plain call.
    """
    if len(calls) == 1:
        return calls[0].args, calls[0].kwargs
    kinds = {path: kind for path, kind, _ in calls[0].key.leaves}
    rows = [call.rows for call in calls]
    args, kwargs = _stack_values([(c.args, c.kwargs) for c in calls], rows, kinds, ())
    return args, kwargs


def split(output: Any, rows: Sequence[int]) -> list[Any]:
    """Cut the output of a stacked forward into one output per call.

    Tensors are cut along their leading dimension; containers and output objects are rebuilt
    around the pieces; plain values go to every call. A single call gets its output untouched.

    Raises:
        UnsplittableError: a tensor has not one leading entry a row, or an object cannot be looked
            into. Handing every call the whole would give each of them the others' result, so the
            caller must run the calls apart.
    """
    if len(rows) == 1:
        return [output]
    return _split_value(output, list(rows))


def _stack_values(
    values: list[Any], rows: list[int], kinds: dict[Path, LeafKind], path: Path
) -> Any:
    first, kind = values[0], kinds[path]
    if kind is not LeafKind.CONTAINER:
        return _stack_leaves(values, rows, kind)
    parts = {
        name: _stack_values([value[name] for value in values], rows, kinds, (*path, name))
        for name in (first if isinstance(first, dict) else range(len(first)))
    }
    return _rebuild(first, parts)


def _stack_leaves(values: list[Any], rows: list[int], kind: LeafKind) -> Any:
    if kind is LeafKind.BATCHED:
        return torch.cat(values)
    if kind is LeafKind.PER_ROW:
        # Schedulers disagree on int or float timesteps; cat promotes, which loses nothing.
        repeated = [v.reshape(-1).expand(count) for v, count in zip(values, rows, strict=True)]
        return torch.cat(repeated)
    return values[0]


def _split_value(value: Any, rows: list[int]) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return _split_tensor(value, rows)
    if isinstance(value, HARMLESS):
        return [value] * len(rows)
    columns = {name: _split_value(part, rows) for name, part in _parts(value).items()}
    return [
        _rebuild(value, {name: column[index] for name, column in columns.items()})
        for index in range(len(rows))
    ]


def _split_tensor(value: torch.Tensor, rows: list[int]) -> list[Any]:
    if value.dim() == 0 or value.shape[0] != sum(rows):
        raise UnsplittableError(f"a tensor of shape {tuple(value.shape)} for {sum(rows)} rows")
    return list(value.split(rows))


def _parts(value: Any) -> dict[Any, Any]:
    """What a container or an output object holds, by key, index or attribute name."""
    if isinstance(value, dict):
        # The output classes of diffusers and transformers are both dicts and dataclasses; as
        # dicts they lack their fields that are None.
        if is_dataclass(value):
            return {field.name: getattr(value, field.name) for field in fields(value)}
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if hasattr(value, "__dict__") and not callable(value):
        return vars(value)
    raise UnsplittableError(f"an object of type {type(value).__name__}")


def _rebuild(value: Any, parts: dict[Any, Any]) -> Any:
    """A container or object like `value` with other parts."""
    if type(value) in (dict, list, tuple):
        return parts if isinstance(value, dict) else type(value)(parts.values())
    if isinstance(value, dict) and is_dataclass(value):
        return type(value)(**parts)
    if isinstance(value, tuple | list):
        make = getattr(value, "_make", type(value))
        return make(parts.values())
    return _rebuild_object(value, parts)


def _rebuild_object(value: Any, parts: dict[Any, Any]) -> Any:
    """Such as a latent distribution: a copy with other attributes, whatever was derived before."""
    other = copy.copy(value)
    if other is value:
        raise UnsplittableError(f"an object of type {type(value).__name__} that copies to itself")
    (other if isinstance(value, dict) else vars(other)).update(parts)
    return other
