"""Stacking the arguments of several calls for one forward, and splitting its output again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import torch

from service.engine.call import Call, LeafKind, Path


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

    Tensors whose leading size is the total row count are split along it; containers and output
    objects are rebuilt around the pieces; everything else goes to every call as it is.
    """
    if len(rows) == 1:
        return [output]
    return _split_value(output, list(rows), sum(rows))


def _stack_values(
    values: list[Any], rows: list[int], kinds: dict[Path, LeafKind], path: Path
) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {
            key: _stack_values([v[key] for v in values], rows, kinds, (*path, key)) for key in first
        }
    if isinstance(first, tuple | list):
        items = [
            _stack_values([v[index] for v in values], rows, kinds, (*path, index))
            for index in range(len(first))
        ]
        return type(first)(items)
    return _stack_leaves(values, rows, kinds[path])


def _stack_leaves(values: list[Any], rows: list[int], kind: LeafKind) -> Any:
    if kind is LeafKind.BATCHED:
        return torch.cat(values)
    if kind is LeafKind.SCALAR:
        # Schedulers disagree on int or float timesteps; cat promotes, which loses nothing.
        repeated = [v.reshape(1).expand(count) for v, count in zip(values, rows, strict=True)]
        return torch.cat(repeated)
    return values[0]


def _split_value(value: Any, rows: list[int], total: int) -> list[Any]:
    if isinstance(value, torch.Tensor):
        if value.dim() > 0 and value.shape[0] == total:
            return list(value.split(rows))
        return [value] * len(rows)
    if isinstance(value, dict):
        return _split_dict(value, rows, total)
    if isinstance(value, tuple | list):
        columns = [_split_value(item, rows, total) for item in value]
        return [type(value)(items) for items in zip(*columns, strict=True)]
    if hasattr(value, "__dict__") and not callable(value):
        return _split_object(value, rows, total)
    return [value] * len(rows)


def _split_dict(value: dict[Any, Any], rows: list[int], total: int) -> list[Any]:
    columns = {key: _split_value(item, rows, total) for key, item in value.items()}
    pieces = [{key: column[i] for key, column in columns.items()} for i in range(len(rows))]
    if is_dataclass(value):
        # The output classes of diffusers and transformers are both dicts and dataclasses.
        return [type(value)(**piece) for piece in pieces]
    return pieces


def _split_object(value: Any, rows: list[int], total: int) -> list[Any]:
    """Such as a latent distribution: a copy for each call, its tensors cut."""
    copies = [copy.copy(value) for _ in rows]
    for name, attribute in vars(value).items():
        for piece, part in zip(copies, _split_value(attribute, rows, total), strict=True):
            setattr(piece, name, part)
    return copies
