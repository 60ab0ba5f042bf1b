"""Stacking the arguments of several calls for one forward, and splitting its output again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import optree
import torch
from optree import PyTreeSpec

from stepserve.engine.calls.arguments import ArgumentKind
from stepserve.engine.calls.call import Call, CallArguments

OUTPUTS = "stepserve.outputs"
"""The namespace in which optree knows how to look into output objects."""

# Output parts that every call may be handed as they are: immutable, and rarely about one row.
HARMLESS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
# Only lists with one entry a row are values.
VALUES = (torch.Tensor, list, *HARMLESS)


class UnsplittableError(TypeError):
    """The output of a stacked forward has a part of which it is unknown whose it is."""


def stack(calls: Sequence[Call], padded_rows: int = 0) -> CallArguments:
    """Arguments for one forward that serves all `calls`, which have equal keys.

    A single call keeps its arguments untouched, so that it is exactly the plain call.

    Args:
        calls: what is served.
        padded_rows: rows that the forward shall have; where the calls have fewer, the last row is
            repeated. The output's further rows are dropped.
    """
    rows = [call.rows for call in calls]
    padding = max(padded_rows - sum(rows), 0)
    if len(calls) == 1 and not padding:
        return calls[0].args, calls[0].kwargs
    stacking = Stacking(rows, padding)
    columns = zip(*(call.leaves for call in calls), strict=True)
    key = calls[0].key
    return key.layout.rebuild(
        [
            stacking.join(column, kind)
            for column, (kind, _) in zip(columns, key.arguments, strict=True)
        ]
    )


def split(output: Any, rows: Sequence[int], padding: int = 0, row_lists: bool = False) -> list[Any]:
    """Cut the output of a stacked forward into one output per call.

    Tensors are cut along their leading dimension; containers and output objects are rebuilt
    around the pieces; plain values go to every call. A single call gets its output untouched.

    Args:
        output: of the forward.
        rows: of each call.
        padding: further rows of the forward, which are dropped.
        row_lists: whether a list with one entry a row is cut like a tensor.

    Raises:
        UnsplittableError: a tensor has not one leading entry a row, or an object cannot be looked
            into. Handing every call the whole would give each of them the others' result, so the
            caller must run the calls apart.
    """
    if len(rows) == 1 and not padding:
        return [output]
    shares = [*rows, padding] if padding else list(rows)
    total = sum(shares)
    whole = (lambda part: type(part) is list and len(part) == total) if row_lists else None
    leaves, structure = flatten_output(output, whole)
    pieces = [_cut(leaf, shares) for leaf in leaves]
    return [structure.unflatten([piece[index] for piece in pieces]) for index in range(len(rows))]


@dataclass(frozen=True)
class Stacking:
    """How the arguments of several calls are joined."""

    rows: list[int]
    padding: int

    def join(self, values: Sequence[Any], kind: ArgumentKind) -> Any:
        """One value of every call: as one."""
        if kind is ArgumentKind.PER_ROW:
            # Schedulers disagree on int or float timesteps; cat promotes, which loses nothing.
            values = [v.reshape(-1).expand(r) for v, r in zip(values, self.rows, strict=True)]
            return self._cat(values, each=1)
        if kind is ArgumentKind.BATCHED:
            return self._cat(values, each=1)
        if kind is ArgumentKind.REPEATED:
            return self._cat(values, each=values[0].shape[0] // self.rows[0])
        if kind is ArgumentKind.LAYERED:
            return self._cat([value.transpose(0, 1) for value in values], each=1).transpose(0, 1)
        if kind is ArgumentKind.ROW_LIST:
            return [entry for value in values for entry in value] + values[-1][-1:] * self.padding
        return values[0]

    def _cat(self, values: Sequence[torch.Tensor], each: int) -> torch.Tensor:
        if self.padding:
            values = [*values, *[values[-1][-each:]] * self.padding]
        return torch.cat(tuple(values))


def _cut(value: Any, shares: list[int]) -> Sequence[Any]:
    """One value of an output as one piece for each share."""
    rows = sum(shares)
    if isinstance(value, list):
        return [value[end - r : end] for end, r in zip(accumulate(shares), shares, strict=True)]
    if not isinstance(value, torch.Tensor):
        return [value] * len(shares)
    if value.dim() == 0 or value.shape[0] != rows:
        raise UnsplittableError(f"a tensor of shape {tuple(value.shape)} for {rows} rows")
    return value.split(shares)


def duplicate(output: Any) -> Any:
    """A copy whose tensors nobody else writes into; the same structure as `output`.

    Raises:
        UnsplittableError: there is an object in it that cannot be looked into.
    """
    return map_tensors(torch.clone, output)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """The same output with other tensors, of whatever shapes `change` gives them.

    Raises:
        UnsplittableError: there is an object in it that cannot be looked into.
    """
    leaves, structure = flatten_output(output)
    return structure.unflatten(
        [change(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    )


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output that `duplicate` copies, whatever its shape."""
    return [leaf for leaf in flatten_output(output)[0] if isinstance(leaf, torch.Tensor)]


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
