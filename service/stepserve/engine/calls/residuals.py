"""What ControlNets and T2I-Adapters have added to activations of a denoiser.

Calls with and without such residuals share forwards: rows without get negative zeros. Adding -0.0
leaves every bit of a number as it is, in any dtype, the sign of a zero included (+0.0 would make
+0.0 of -0.0). So a row gets what it would get without residuals. Where no call of a forward has
any, nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from stepserve.engine.calls.arguments import ArgumentRules, describe_plain, flatten, unflatten

NOTHING_ADDED = -0.0


@dataclass(frozen=True, eq=False)
class Residual:
    """One argument whose tensors are added to activations.

    Args:
        tensors: each with one leading entry a row.
        structure: how they stand in the argument.
        form: what must agree where two calls that share a forward both have the argument.
        settings: arguments that say how it is added.
    """

    tensors: Sequence[Tensor]
    structure: PyTreeSpec
    form: Hashable
    settings: Mapping[str, Any]


Residuals = Mapping[str, Residual]
"""The residuals of one call, by the name of the argument."""

NO_RESIDUALS: Residuals = {}


def read_residuals(rules: ArgumentRules, kwargs: Mapping[str, Any]) -> Residuals:
    """Those arguments of a call that a rule names, and that hold tensors and nothing else."""
    names = [name for name in kwargs if name in rules.residuals and kwargs[name] is not None]
    if not names:
        return NO_RESIDUALS
    settings = {name: kwargs[name] for name in rules.residual_settings & kwargs.keys()}
    said = frozenset((name, describe_plain(value)) for name, value in settings.items())
    found = {name: _read(kwargs[name], said, settings) for name in names}
    return {name: residual for name, residual in found.items() if residual is not None}


def have_rows(residuals: Residuals, rows: int, dtype: torch.dtype | None) -> bool:
    """Whether all tensors have one leading entry a row, and the dtype of what they are added to.

    Those of a wider dtype would change the dtype of all rows.
    """
    return all(
        tensor.dim() > 0 and tensor.shape[0] == rows and tensor.dtype == dtype
        for residual in residuals.values()
        for tensor in residual.tensors
    )


def agree(one: Residuals, other: Residuals) -> bool:
    """Whether two calls, which are equal otherwise, may share a forward."""
    return all(one[name].form == other[name].form for name in one.keys() & other.keys())


def join_residuals(
    each: Sequence[Residuals], rows: Sequence[int], cat: Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, Any]:
    """The arguments of a forward for several calls: all residuals that any of them has.

    Args:
        each: of every call; each pair of them agrees.
        rows: of every call.
        cat: stacks one tensor of every call.
    """
    arguments: dict[str, Any] = {}
    for name, like in _first_of_each_name(each).items():
        columns = [
            residuals[name].tensors if name in residuals else _nothing(like.tensors, count)
            for residuals, count in zip(each, rows, strict=True)
        ]
        tensors = [cat(column) for column in zip(*columns, strict=True)]
        arguments |= {name: unflatten(like.structure, tensors), **like.settings}
    return arguments


def _read(value: Any, said: Hashable, settings: Mapping[str, Any]) -> Residual | None:
    tensors, structure = flatten(value)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    shapes = tuple((tensor.dtype, tensor.shape[1:], tensor.device) for tensor in tensors)
    return Residual(tensors, structure, (structure, shapes, said), settings)


def _first_of_each_name(each: Iterable[Residuals]) -> dict[str, Residual]:
    found: dict[str, Residual] = {}
    for residuals in each:
        found = {**residuals, **found}
    return found


def _nothing(like: Sequence[Tensor], rows: int) -> list[Tensor]:
    return [_negative_zeros(tensor, rows) for tensor in like]


def _negative_zeros(like: Tensor, rows: int) -> Tensor:
    # Tensors of one memory format are stacked without being rearranged.
    is_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    empty = torch.empty(
        (rows, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=memory_format
    )
    return empty.fill_(NOTHING_ADDED)
