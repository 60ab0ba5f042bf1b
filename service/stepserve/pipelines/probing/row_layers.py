"""Which layers of a denoiser get inputs that begin with the rows of the forward.

Adapters that differ from row to row can be added in those only. It is tried: of a forward of a few
rows one row is changed, then another. What a layer gets must change in the place of that row, and
nowhere else in a single bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepserve.engine.batch_invariance import one_row, run_together, varied
from stepserve.engine.calls.call import Call
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.adapters.mixing import BASES
from stepserve.pipelines.modules.parking import (
    ParkingOptions,
    components_of,
    parkable_methods,
)
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import ProbeRequest

logger = logging.getLogger(__name__)

ROWS = 3
# Changes that are tried. A single one may be lost in the rounding of half precision.
TRIES = 2
# By how much sums of equal rows may differ, as a share and by itself.
SAME = 1e-2


class Input(NamedTuple):
    """What a layer got at one of its calls.

    Args:
        row_size: numbers of one row; 0 where it cannot be cut into rows.
        sums: of the numbers of each row, each with a weight of its own.
    """

    row_size: int
    sums: Tensor


Seen = dict[str, list[Input]]
"""By path of a layer, what it got at each of its calls."""


def find_row_layers(
    pipeline: Any, probes: Sequence[ProbeRequest], options: ParkingOptions
) -> dict[str, frozenset[str]]:
    """By path of a denoiser, which of its layers that may have adapters get rows in order.

    Layers that no probe request comes by are left out. Run it on the engine's thread, before the
    pipeline is attached to the engine.

    Args:
        pipeline: a resident one.
        probes: small requests of every task that it serves.
        options: how it is attached meanwhile.
    """
    modules = dict(components_of(pipeline))
    stepped = {path for path, _, rule in parkable_methods(pipeline) if rule.stage == Stage.DENOISE}
    found: dict[str, list[Mapping[str, bool]]] = {path: [] for path in stepped}
    try:
        # Rows that fill forwards up would be taken for parts of others.
        unfilled = replace(options, bucket_rows=())
        with parked_at(Stage.DENOISE, pipeline, probes, unfilled) as groups:
            for group in groups:
                path = group[0].method.module
                found[path].append(_look(group[0], modules[path]))
    except Exception:
        logger.warning("layers could not be looked at, so adapters are not mixed", exc_info=True)
        return {}
    return {path: _in_all(seen) for path, seen in found.items()}


def _look(call: Call, module: nn.Module) -> dict[str, bool]:
    """By path of each layer that the call comes by, whether its rows are in order."""
    generator = torch.Generator().manual_seed(0)
    calls, *others = (
        [varied(one_row(call), generator) for _ in range(ROWS)] for _ in range(1 + TRIES)
    )
    before, alone = _see(module, calls), _see(module, calls[:1])
    after = [
        [_see(module, [*calls[:row], changed[row], *calls[row + 1 :]]) for row in range(ROWS)]
        for changed in others
    ]
    return {
        layer: any(
            _all_have_rows(got, [seen.get(layer, []) for seen in each], alone.get(layer, []))
            for each in after
        )
        for layer, got in before.items()
    }


def _in_all(seen: Sequence[Mapping[str, bool]]) -> frozenset[str]:
    paths = {path for each in seen for path in each}
    return frozenset(path for path in paths if all(each.get(path, True) for each in seen))


def _see(module: nn.Module, calls: Sequence[Call]) -> Seen:
    """What the layers of a module get in a forward of calls that have one row each."""
    seen: Seen = {}
    with ExitStack() as stack:
        for path, layer in module.named_modules():
            if type(layer) in BASES:
                hook = layer.register_forward_pre_hook(partial(_note, seen, path, len(calls)))
                stack.callback(hook.remove)
        run_together(calls)
    return seen


def _note(seen: Seen, path: str, rows: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
    seen.setdefault(path, []).append(_read(args[0] if args else None, rows))


def _read(states: Any, rows: int) -> Input:
    if not isinstance(states, Tensor) or states.shape[0] % rows != 0:
        return Input(0, torch.zeros(rows))
    numbers = states.detach().reshape(rows, -1).float()
    weights = torch.cos(torch.arange(numbers.shape[1], device=numbers.device))
    return Input(numbers.shape[1], (numbers * weights).sum(1).cpu())


def _all_have_rows(
    before: Sequence[Input], after: Sequence[Sequence[Input]], alone: Sequence[Input]
) -> bool:
    """Whether that holds for each call of a layer."""
    if any(len(calls) != len(before) for calls in (*after, alone)):
        return False
    return all(
        _has_rows(got, [calls[number] for calls in after], alone[number])
        for number, got in enumerate(before)
    )


def _has_rows(before: Input, after: Sequence[Input], alone: Input) -> bool:
    """Whether a layer gets one row after the other.

    Args:
        before: what it got.
        after: what it got once the first row was changed, the second row, and so on.
        alone: what it got for a single row.
    """
    if before.row_size == 0 or before.row_size != alone.row_size:
        return False
    is_changed = torch.stack([got.sums != before.sums for got in after])
    if is_changed.any():
        return torch.equal(is_changed, torch.eye(ROWS, dtype=torch.bool))
    # It hangs on nothing that was changed. Then all rows must have the same, but for rounding.
    return torch.allclose(before.sums, before.sums[0], SAME, SAME)
