"""Which layers of a denoiser get inputs that begin with the rows of the forward.

Adapters that differ from row to row can be added in those only. It is tried: a forward of three
rows that differ is compared with forwards of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
# Numbers that tell the content of a row.
SUMMARY = 8
# Of what two rows differ by: the most that a row may differ from the same row by itself.
SHARE_OF_SEPARATION = 0.25
# Of the largest number: rows that differ by less are the same.
ROUNDING = 0.02


class Input(NamedTuple):
    """What a layer got at one of its calls.

    Args:
        row_size: numbers of one row; 0 where it cannot be cut into rows.
        summary: what tells the content of each row, of shape (rows, SUMMARY).
    """

    row_size: int
    summary: Tensor


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
    calls = [varied(one_row(call), generator) for _ in range(ROWS)]
    with _seeing(module, ROWS) as together:
        run_together(calls)
    each = []
    for alone in calls:
        with _seeing(module, 1) as seen:
            run_together([alone])
        each.append(seen)
    return {
        layer: _are_rows(got, [seen.get(layer, []) for seen in each])
        for layer, got in together.items()
    }


def _in_all(seen: Sequence[Mapping[str, bool]]) -> frozenset[str]:
    paths = {path for each in seen for path in each}
    return frozenset(path for path in paths if all(each.get(path, True) for each in seen))


@contextmanager
def _seeing(module: nn.Module, rows: int) -> Iterator[Seen]:
    seen: Seen = {}
    with ExitStack() as stack:
        for path, layer in module.named_modules():
            if type(layer) in BASES:
                hook = layer.register_forward_pre_hook(partial(_note, seen, path, rows))
                stack.callback(hook.remove)
        yield seen


def _note(seen: Seen, path: str, rows: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
    seen.setdefault(path, []).append(_read(args[0] if args else None, rows))


def _read(states: Any, rows: int) -> Input:
    if not isinstance(states, Tensor) or states.shape[0] % rows != 0:
        return Input(0, torch.empty(rows, SUMMARY))
    flat = states.detach().reshape(rows, -1).float()
    weighed = flat * torch.cos(torch.arange(flat.shape[1], device=flat.device))
    summary = nn.functional.adaptive_avg_pool1d(weighed[None], SUMMARY)[0]
    return Input(flat.shape[1], summary.cpu())


def _are_rows(together: Sequence[Input], each: Sequence[Sequence[Input]]) -> bool:
    """Whether each call of a layer got, row by row, what it gets for each row by itself."""
    if any(len(calls) != len(together) for calls in each):
        return False
    return all(
        _has_rows(got, [calls[number] for calls in each]) for number, got in enumerate(together)
    )


def _has_rows(together: Input, each: Sequence[Input]) -> bool:
    if together.row_size == 0 or any(one.row_size != together.row_size for one in each):
        return False
    alone = torch.cat([one.summary for one in each])
    off = float((together.summary - alone).abs().max())
    apart = min(
        float((alone[one] - alone[other]).abs().max())
        for one in range(ROWS)
        for other in range(one)
    )
    rounding = ROUNDING * float(alone.abs().max())
    return off <= max(SHARE_OF_SEPARATION * apart, rounding if apart <= rounding else 0.0)
