"""Stacking the arguments of several calls for one forward, and splitting its output again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from stepserve.engine.calls.arguments import ArgumentKind, row_entry
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.call_key import CallArguments
from stepserve.engine.calls.objects import UnsplittableError, flatten_output
from stepserve.engine.calls.residuals import join_residuals


def stack(calls: Sequence[Call], padded_rows: int = 0) -> CallArguments:
    """Arguments for one forward that serves all `calls`: equal keys, and residuals that agree.

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
    args, kwargs = key.layout.rebuild(
        [
            stacking.join(column, kind)
            for column, (kind, _) in zip(columns, key.arguments, strict=True)
        ]
    )
    residuals = [call.residuals for call in calls]
    if any(residuals):
        kwargs |= join_residuals(residuals, rows, stacking.batch)
    return args, kwargs


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


def share_out(
    calls: Sequence[Call], arguments: CallArguments, output: Any, padding: int = 0
) -> list[Any]:
    """Give each call what a forward has made for it: its output, and what its caches hold now.

    Args:
        calls: that the forward has served.
        arguments: of the forward, as `stack` made them.
        output: of the forward.
        padding: further rows of the forward, which are dropped.

    Raises:
        UnsplittableError: as `split`; no cache of a call has been written to then.
    """
    rows = [call.rows for call in calls]
    outputs = split(output, rows, padding, calls[0].method.rules.cuts_lists)
    if calls[0].method.rules.caches and arguments[1] is not calls[0].kwargs:
        _hand_back_caches(calls, arguments, padding)
    return outputs


def _hand_back_caches(calls: Sequence[Call], arguments: CallArguments, padding: int) -> None:
    """Each call's caches get their rows of what the forward has left in the joined ones."""
    joined, _ = calls[0].method.flatten(*arguments)
    rows = [call.rows for call in calls]
    places = [
        place
        for place, (kind, _) in enumerate(calls[0].key.arguments)
        if kind is ArgumentKind.CACHE
    ]
    pieces = {place: split(joined[place], rows, padding) for place in places}
    for place, parts in pieces.items():
        for call, part in zip(calls, parts, strict=True):
            vars(call.leaves[place]).update(vars(part))


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
            return self.batch(values)
        if kind is ArgumentKind.REPEATED:
            return self._cat(values, each=values[0].shape[0] // self.rows[0])
        if kind is ArgumentKind.LAYERED:
            return self._cat([value.transpose(0, 1) for value in values], each=1).transpose(0, 1)
        if kind is ArgumentKind.ROW_LIST:
            entries = [entry for value in values for entry in value]
            if len(set(map(type, entries))) > 1:
                entries = [*map(row_entry, entries)]
            return entries + entries[-1:] * self.padding
        if kind is ArgumentKind.CACHE:
            return self._join_objects(values)
        return values[0]

    def _join_objects(self, values: Sequence[Any]) -> Any:
        """A new object like these, which hold the same values in the same places."""
        leaves, structures = zip(*map(flatten_output, values), strict=True)
        joined = [
            self._cat(column, each=1) if isinstance(column[0], torch.Tensor) else column[0]
            for column in zip(*leaves, strict=True)
        ]
        return structures[0].unflatten(joined)

    def batch(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor of every call, each with a leading entry a row: as one."""
        return self._cat(values, each=1)

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
