"""What a compiled graph is made for: arguments of one shape, brought into one form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch

from stepserve.engine.calls.arguments import flatten, unflatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones and named ones of one forward."""


class UniformArguments:
    """Brings the arguments of a denoiser into the form that its graphs were compiled for.

    A call that shares no forward keeps its timestep as the pipeline made it: one number, an integer
    or not as its scheduler likes. Stacked calls have one a row, of shape (rows,). A denoiser takes
    all of these for the same.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        names = list(inspect.signature(forward).parameters)
        self._place = names.index("timestep") if "timestep" in names else None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the same arguments with one timestep a row, and densely laid out."""
        rows = rows_of(args, kwargs)
        if "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": _one_a_row(kwargs["timestep"], rows)}
        elif self._place is not None and self._place < len(args):
            timestep = _one_a_row(args[self._place], rows)
            args = (*args[: self._place], timestep, *args[self._place + 1 :])
        leaves, structure = flatten((args, kwargs))
        args, kwargs = unflatten(structure, map(_dense, leaves))
        return args, kwargs


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The leading size of the first tensor that has dimensions; 1 where there is none."""
    leaves, _ = flatten((args, list(kwargs.values())))
    sizes = (leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next(sizes, 1)


def shape_of(call: Arguments) -> Hashable:
    """Equal for calls that the same graph can serve."""
    leaves, structure = flatten(call)
    return structure, tuple(_describe(leaf) for leaf in leaves)


def _one_a_row(timestep: Any, rows: int) -> Any:
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1:
        return _fractional(timestep)
    return _fractional(timestep.reshape(1)).expand(rows)


def _fractional(timestep: Any) -> Any:
    whole = isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()
    return timestep.float() if whole else timestep


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, tuple(leaf.shape), leaf.device
    return type(leaf), repr(leaf)


def _dense(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf
