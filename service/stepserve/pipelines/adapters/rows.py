"""What LoRA layers compute where each row of a forward has adapters of its own.

The base layer runs once for all rows. What adapters add is made by two small factors. Those of a
linear layer are stacked by row: a batched matrix product with each does all rows that have one.
Those of a convolution are applied call by call. The arithmetic is PEFT's, with its roundings: the
two factors, then the scale, then the sum.

A batched product gives each row what it gives it alone. So a row's bits do not depend on the
others: rows are grouped by the rank of their adapters, and rows without an adapter are left out.
S-LoRA (https://arxiv.org/abs/2311.03285) and Punica (https://arxiv.org/abs/2310.18547) do the same
for language models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.Conv3d

KEPT_BYTES = 256 * 2**20
"""How much of stacked factors one module keeps. More are gathered again at every forward."""

MOST_KEPT = 64
"""Of how many different sequences of rows."""

# Factors of rank 1 are filled up with zeros: matrix kernels treat vectors otherwise, and in
# another way for one row than for several.
LEAST_RANK = 2


class Slot(NamedTuple):
    """One adapter of a row, by the name that PEFT has for it."""

    name: str
    scale: float


Slots = tuple[Slot, ...]
"""The adapters of a row in the order in which they are added; empty where it has none."""

Run = tuple[Slots, int]
"""What the rows of one call have, and how many there are."""


@dataclass(frozen=True)
class RowFactors:
    """What some rows of a forward, with adapters of one rank, have added in a linear layer.

    Args:
        rows: which rows.
        down: of shape (rows, rank, in features).
        up: of shape (rows, out features, rank).
        scale: that all rows have, or of shape (rows, 1, 1).
    """

    rows: slice | Tensor
    down: Tensor
    up: Tensor
    scale: float | Tensor

    @property
    def size_bytes(self) -> int:
        """Memory that it holds."""
        return self.down.nbytes + self.up.nbytes

    def add_to(self, result: Tensor, states: Tensor) -> None:
        """Add what the adapters make of an input, in place.

        Args:
            result: what the base layer made of it, of shape (rows, ..., out features).
            states: the input, of shape (rows, ..., in features), of all rows of the forward.
        """
        result, states = result.view(len(result), -1, result.shape[-1]), states.flatten(1, -2)
        added = torch.bmm(torch.bmm(states[self.rows], self.down.mT), self.up.mT)
        if isinstance(self.scale, Tensor):
            # Rounded once, as a product with a Python number is.
            added = (added * self.scale).to(added.dtype)
        elif self.scale != 1:
            added *= self.scale
        if isinstance(self.rows, slice):
            result[self.rows] += added
        else:
            result.index_add_(0, self.rows, added)


@dataclass(frozen=True)
class RowConvolution:
    """What the rows of one call have added in a convolution by one adapter.

    Kernels of a grouped convolution, which could do all rows at once, give a row other bits for
    another number of groups, and took longer where images are not very small.

    Args:
        rows: which rows.
        down: the first factor.
        up: the second factor.
        scale: that their product is multiplied with.
    """

    rows: slice
    down: Convolution
    up: Convolution
    scale: float

    @property
    def size_bytes(self) -> int:
        """It holds the adapter's own factors."""
        return 0

    def add_to(self, result: Tensor, states: Tensor) -> None:
        """Add what the adapter makes of these rows of an input, in place.

        Args:
            result: what the base layer made of it, of shape (rows, images, channels, ...).
            states: the input, of shape (rows, images, channels, ...).
        """
        added = self.up(self.down(states[self.rows].flatten(0, 1)))
        if self.scale != 1:
            added *= self.scale
        result[self.rows] += added.view_as(result[self.rows])


Addition = RowFactors | RowConvolution
Gathered = dict[Any, Sequence[Addition]]
"""By layer, what it adds to the rows of one forward."""


class RowAdapters:
    """The adapters of each row of the next forward of one module.

    Layers that were `wrapped` look here at what they add. While nothing is `set`, they do what PEFT
    does.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._runs: tuple[Run, ...] | None = None
        self._rows = 0
        # By what the rows have, least recently used first; then by layer.
        self._gathered: OrderedDict[tuple[Run, ...], Gathered] = OrderedDict()
        self._current: Gathered = {}
        self._held_bytes = 0

    def set(self, runs: Iterable[Run]) -> None:
        """What the rows of the next forward have, call by call."""
        self._runs = tuple(runs)
        self._rows = sum(rows for _, rows in self._runs)
        self._current = self._gathered.setdefault(self._runs, {})
        self._gathered.move_to_end(self._runs)
        if len(self._gathered) > MOST_KEPT:
            self._drop_one()

    def unset(self) -> None:
        """PEFT's own setting holds for all rows."""
        self._runs = None

    def forget(self) -> None:
        """Drop all stacked factors, as adapters come or go."""
        self.unset()
        self._gathered.clear()
        self._current = {}
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Memory of the stacked factors that are kept."""
        return self._held_bytes

    def wrap(self, layer: Any) -> None:
        """Make a LoRA layer of PEFT add to each row what is set for it. It goes with the layer.

        Args:
            layer: around a linear layer or a convolution whose inputs begin with the rows, or with
                several entries of each row.
        """
        layer.forward = partial(self._forward, layer, type(layer).forward)

    def _forward(
        self, layer: Any, plain: Callable[..., Tensor], states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._runs is None:
            return plain(layer, states, *args, **kwargs)
        result: Tensor = layer.base_layer(states, *args, **kwargs)
        additions = self._additions(layer, self._runs)
        if additions:
            by_row = result.view(self._rows, -1, *result.shape[1:])
            states = states.reshape(self._rows, -1, *states.shape[1:])
            for addition in additions:
                addition.add_to(by_row, states)
        return result

    def _additions(self, layer: Any, runs: tuple[Run, ...]) -> Sequence[Addition]:
        if layer in self._current:
            return self._current[layer]
        additions = gather(layer, runs)
        size_bytes = sum(addition.size_bytes for addition in additions)
        self._make_room(size_bytes)
        if self._held_bytes + size_bytes <= self._kept_bytes:
            self._current[layer] = additions
            self._held_bytes += size_bytes
        return additions

    def _make_room(self, size_bytes: int) -> None:
        """Drop what was used least recently, but for the rows of the forward that is running."""
        while len(self._gathered) > 1 and self._held_bytes + size_bytes > self._kept_bytes:
            self._drop_one()

    def _drop_one(self) -> None:
        _, dropped = self._gathered.popitem(last=False)
        self._held_bytes -= sum(part.size_bytes for each in dropped.values() for part in each)


def gather(layer: Any, runs: Sequence[Run]) -> Sequence[Addition]:
    """What one LoRA layer adds to the rows of a forward, in the order in which to add it.

    Args:
        layer: of PEFT.
        runs: the adapters of the rows; those that the layer lacks are left out.
    """
    own = [(tuple(slot for slot in slots if slot.name in layer.lora_A), n) for slots, n in runs]
    if isinstance(layer.get_base_layer(), nn.Linear):
        return _products(layer, [slots for slots, count in own for _ in range(count)])
    return list(_convolutions(layer, own))


def _products(layer: Any, rows: Sequence[Slots]) -> list[RowFactors]:
    groups: dict[tuple[int, int], list[tuple[int, Slot]]] = {}
    for row, slots in enumerate(rows):
        for place, slot in enumerate(slots):
            groups.setdefault((place, layer.r[slot.name]), []).append((row, slot))
    return [_stack(layer, groups[group]) for group in sorted(groups)]


def _convolutions(layer: Any, runs: Sequence[Run]) -> Iterator[RowConvolution]:
    first = 0
    for slots, count in runs:
        for slot in slots:
            down, up = layer.lora_A[slot.name], layer.lora_B[slot.name]
            yield RowConvolution(slice(first, first + count), down, up, _scaling(layer, slot))
        first += count


def _stack(layer: Any, group: Sequence[tuple[int, Slot]]) -> RowFactors:
    names = [slot.name for _, slot in group]
    down = torch.stack([layer.lora_A[name].weight.detach() for name in names])
    up = torch.stack([layer.lora_B[name].weight.detach() for name in names])
    missing = LEAST_RANK - down.shape[1]
    if missing > 0:
        down = nn.functional.pad(down, (0, 0, 0, missing))
        up = nn.functional.pad(up, (0, missing))
    scales = [_scaling(layer, slot) for _, slot in group]
    return RowFactors(
        _places([row for row, _ in group], down.device), down, up, _one_scale(scales, down)
    )


def _scaling(layer: Any, slot: Slot) -> float:
    """What PEFT multiplies the product of the factors with."""
    rank, alpha = layer.r[slot.name], layer.lora_alpha[slot.name]
    return float(slot.scale * alpha / (math.sqrt(rank) if layer.use_rslora[slot.name] else rank))


def _one_scale(scales: Sequence[float], like: Tensor) -> float | Tensor:
    if len(set(scales)) == 1:
        return scales[0]
    # Kernels take Python numbers in this precision.
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.tensor(scales, dtype=dtype, device=like.device).view(-1, 1, 1)


def _places(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return torch.tensor(rows, device=device)
