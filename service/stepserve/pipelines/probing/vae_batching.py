"""Decodings of several requests in one forward, where that changes no bit and saves time.

Usually a VAE rounds otherwise for another number of images, so decodings run one call at a time.
With one thread a replica it was seen not to: what depended on the number of images was how work
is split among threads. So on CPUs it is tried at the start, at the native size; other sizes, which
were not tried, keep forwards of their own. On GPUs images are decoded beside the steps of others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stepserve.engine.batch_invariance import independent_rows, one_row, run_together, varied
from stepserve.engine.calls.call import Call, ParkableMethod
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.modules.shape_methods import ShapeMethods
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, Trial
from stepserve.pipelines.probing.sharing_plan import SharingPlan

logger = logging.getLogger(__name__)

MOST_ROWS = 8
# Who would have been first waits for all the others. So it must be worth it, which it is for small
# images only, whose forwards take longer than their arithmetic.
LONGEST_ALONE_S = 0.1
MOST_OF_ALONE = 0.75


class DecodingRules:
    """Gives decodings of the shapes that were tried the rows that they may share.

    Args:
        rows: most rows of a forward by the shape of its calls.
    """

    def __init__(self, rows: Mapping[Hashable, int]) -> None:
        self.rows = rows
        self._methods = ShapeMethods(self._with_rows)

    def __call__(self, call: Call) -> Call:
        """The call, with its method as its shape allows."""
        return self._methods.give(call) if call.method.stage == Stage.DECODE else call

    def _with_rows(self, call: Call) -> ParkableMethod:
        rows = self.rows.get(call.key.shape, call.method.max_rows)
        return replace(call.method, max_rows=rows)


def decoding_rules(pipeline: Any, trial: Trial, plan: SharingPlan) -> DecodingRules:
    """Find out whether decodings like that of a small request may share a forward.

    Run it on the engine's thread, before the pipeline is attached to the engine.
    """
    with parked_at(Stage.DECODE, pipeline, [trial], plan.parking(ENOUGH_ROWS)) as groups:
        found = {calls[0].key.shape: rows_worth_sharing(calls[0]) for calls in groups}
    rules = DecodingRules({shape: rows for shape, rows in found.items() if rows > 1})
    if rules.rows:
        logger.info("up to %d images are decoded together", max(rules.rows.values()))
    return rules


def rows_worth_sharing(
    call: Call, most_rows: int = MOST_ROWS, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Most rows of a forward for calls like this one; 1 where sharing gains little, or costs bits.

    Args:
        call: a decoding; it is run several times.
        most_rows: where to stop trying.
        clock: seconds, monotonic.
    """
    generator = torch.Generator().manual_seed(0)
    calls = [varied(one_row(call), generator) for _ in range(most_rows)]
    serial_s = _seconds(calls[:1], clock)
    if serial_s > LONGEST_ALONE_S:
        return 1
    rows = independent_rows(calls, most_rows)
    return rows if _seconds(calls[:rows], clock) <= MOST_OF_ALONE * rows * serial_s else 1


def _seconds(calls: Sequence[Call], clock: Callable[[], float]) -> float:
    """Of the faster of two forwards: the first of a shape is slow."""
    seconds = []
    for _ in range(2):
        started_s = clock()
        run_together(calls)
        seconds.append(clock() - started_s)
    return min(seconds)
