"""Denoiser calls that need only half of their rows.

Classifier-free guidance calls the denoiser with the unconditional rows followed by the conditional
ones, and mixes the two outputs: `u + g * (c - u)`. At a step without guidance only the conditional
output counts. Then only the conditional rows are run, and their output is returned for both
halves: the pipeline's own arithmetic gives `c + g * (c - c)`, which is `c` in every bit. So the
pipeline need not know, and the rows are free for other requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stepserve.engine.calls.arguments import ArgumentKind, classify, flatten, unflatten
from stepserve.engine.calls.call_key import CallArguments
from stepserve.engine.calls.stacking import map_tensors


class GuidanceIntervalError(RuntimeError):
    """A call has other rows than its request said, so that it is unknown which half counts."""


@dataclass(eq=False)
class GuidanceInterval:
    """Which calls of one track run with their second half of rows only. For one track.

    Args:
        rows: rows of a whole call.
        calls: how many calls of a method are expected.
        needs_all: whether call number i (from 0) of a method needs all of its rows.
    """

    rows: int
    calls: int
    needs_all: Callable[[int], bool]
    _seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        whole = (index + 1 for index in range(self.calls) if self.needs_all(index))
        self._whole_until = max(whole, default=0)

    def rows_from(self, index: int) -> int:
        """The most rows that any call from that number on takes. Never grows with `index`."""
        may_be_whole = index < self._whole_until or self._whole_until == self.calls
        return self.rows if may_be_whole else self.rows // 2

    def is_due(self, method: str) -> bool:
        """Whether the next call of a method is to be narrowed. Ask once for each call."""
        index = self._seen[method]
        self._seen[method] += 1
        return not self.needs_all(index)

    def narrow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], untouched: frozenset[str]
    ) -> CallArguments:
        """The arguments with only the second half of the rows.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            untouched: keyword arguments that have no rows, whatever their leading size.

        Raises:
            GuidanceIntervalError: no argument has the rows that a whole call should have.
        """
        with_rows = {name: value for name, value in kwargs.items() if name not in untouched}
        leaves, structure = flatten((args, with_rows))
        if not any(classify(leaf, self.rows) is ArgumentKind.BATCHED for leaf in leaves):
            raise GuidanceIntervalError(
                f"guidance cannot be limited to an interval: a call of {self.rows} rows was "
                "expected, with the conditional ones behind the others"
            )
        half_args, half_kwargs = unflatten(structure, map(self._second_half, leaves))
        return half_args, kwargs | half_kwargs

    def widen(self, output: Any) -> Any:
        """The output of a narrowed call as that of a whole one: each half gets the same.

        Raises:
            GuidanceIntervalError: a tensor in it has not one leading entry a row.
            UnsplittableError: there is an object in it that cannot be looked into.
        """
        return map_tensors(self._twice, output)

    def _second_half(self, value: Any) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == self.rows
        return value[self.rows // 2 :] if has_rows else value

    def _twice(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != self.rows // 2:
            shape = tuple(tensor.shape)
            raise GuidanceIntervalError(f"an output of shape {shape} for {self.rows // 2} rows")
        return torch.cat([tensor, tensor])
