"""Stacking the arguments of several calls for one forward, and splitting its output again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import torch

from stepserve.engine.calls.arguments import ArgumentKind, Path
from stepserve.engine.calls.call import Call

# Output parts that every call may be handed as they are: immutable, and rarely about one row.
HARMLESS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class UnsplittableError(TypeError):
    """The output of a stacked forward has a part of which nobody knows whose it is."""


def stack(calls: Sequence[Call], padded_rows: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one forward that serves all `calls`, which have equal keys.

    A single call keeps its arguments untouched, so that it is exactly the plain call.

    Args:
        calls: what is served.
        padded_rows: rows that the forward shall have; where the calls have fewer, the last row is
            repeated. The output's further rows belong to nobody.
    """
    rows = [call.rows for call in calls]
    padding = max(padded_rows - sum(rows), 0)
    if len(calls) == 1 and not padding:
        return calls[0].args, calls[0].kwargs
    stacking = Stacking(rows, padding, {path: kind for path, kind, _ in calls[0].key.leaves})
    args = tuple(
        stacking.join([call.args[index] for call in calls], (0, index))
        for index in range(len(calls[0].args))
    )
    kwargs = {
        name: stacking.join([call.kwargs[name] for call in calls], (1, name))
        for name in calls[0].kwargs
    }
    return args, kwargs


def split(output: Any, rows: Sequence[int], padding: int = 0, row_lists: bool = False) -> list[Any]:
    """Cut the output of a stacked forward into one output per call.

    Tensors are cut along their leading dimension; containers and output objects are rebuilt
    around the pieces; plain values go to every call. A single call gets its output untouched.

    Args:
        output: of the forward.
        rows: of each call.
        padding: further rows of the forward that belong to nobody.
        row_lists: whether a list with one entry a row is cut like a tensor.

    Raises:
        UnsplittableError: a tensor has not one leading entry a row, or an object cannot be looked
            into. Handing every call the whole would give each of them the others' result, so the
            caller must run the calls apart.
    """
    if len(rows) == 1 and not padding:
        return [output]
    shares = [*rows, padding] if padding else list(rows)
    return Splitting(shares, row_lists).cut(output)[: len(rows)]


@dataclass(frozen=True)
class Stacking:
    """How the arguments of several calls are joined."""

    rows: list[int]
    padding: int
    kinds: dict[Path, ArgumentKind]

    def join(self, values: list[Any], path: Path) -> Any:
        """One argument, or one part of it, of every call: as one."""
        kind = self.kinds[path]
        if kind is not ArgumentKind.CONTAINER:
            return self._join_leaves(values, kind)
        first = values[0]
        parts = {
            name: self.join([value[name] for value in values], (*path, name))
            for name in (first if isinstance(first, dict) else range(len(first)))
        }
        return _rebuild(first, parts)

    def _join_leaves(self, values: list[Any], kind: ArgumentKind) -> Any:
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

    def _cat(self, values: list[torch.Tensor], each: int) -> torch.Tensor:
        if self.padding:
            values = [*values, *[values[-1][-each:]] * self.padding]
        return torch.cat(values)


@dataclass(frozen=True)
class Splitting:
    """How an output is cut into shares of so many rows."""

    shares: list[int]
    row_lists: bool

    def cut(self, value: Any) -> list[Any]:
        """A value, or a part of it, as one piece for each share."""
        if isinstance(value, torch.Tensor):
            return self._cut_tensor(value)
        if isinstance(value, HARMLESS):
            return [value] * len(self.shares)
        if self.row_lists and isinstance(value, list) and len(value) == sum(self.shares):
            ends = list(accumulate(self.shares))
            return [value[end - r : end] for end, r in zip(ends, self.shares, strict=True)]
        columns = {name: self.cut(part) for name, part in _parts(value).items()}
        return [
            _rebuild(value, {name: column[index] for name, column in columns.items()})
            for index in range(len(self.shares))
        ]

    def _cut_tensor(self, value: torch.Tensor) -> list[Any]:
        rows = sum(self.shares)
        if value.dim() == 0 or value.shape[0] != rows:
            raise UnsplittableError(f"a tensor of shape {tuple(value.shape)} for {rows} rows")
        return list(value.split(self.shares))


def duplicate(output: Any) -> Any:
    """A copy whose tensors nobody else writes into; the same structure as `output`.

    Raises:
        UnsplittableError: there is an object in it that cannot be looked into.
    """
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, HARMLESS):
        return output
    return _rebuild(output, {name: duplicate(part) for name, part in _parts(output).items()})


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output that `duplicate` copies."""
    if isinstance(output, torch.Tensor):
        yield output
    elif not isinstance(output, HARMLESS):
        for part in _parts(output).values():
            yield from tensors_in(part)


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
