"""How the requests of one model share forwards: found out once, before it serves.

Three things are asked of the pipeline and of the device, in this order:

1. Does a call change shared modules while it runs? A text encoder or VAE that it changes runs in
   the call, unparked, so that nobody else gets to see the change. If it changes what is called at
   every step, its requests run one at a time.
2. Do requests at once get what each gets by itself? The parity suite has shown it for some; any
   other is tried here, and runs one at a time if not.
3. Do rows depend on what they share a forward with, in their last bits? Forwards get no more rows
   than are free of that. If those are too few, it may be cured by filling forwards up to one row
   count, or to the next of several that give a row the same bits. Rows of different lengths in one
   forward do depend on one another, so where these share it is not tried.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepserve.engine.batch_invariance import (
    agreeing_row_counts,
    independent_rows,
    varied,
    vector_layer_calls,
)
from stepserve.engine.calls.call import Call
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.facts.verified_families import VERIFIED
from stepserve.pipelines.modules.parking import (
    ParkingOptions,
    fills_text,
    parkable_methods,
    takes_lengths,
)
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    PlainRun,
    ProbeRequest,
    check_sharing,
    run_plainly,
)

logger = logging.getLogger(__name__)

FIXED_ROWS = 8
"""Large enough to fill a CPU, and small enough not to make a single request wait for nobody."""

# What else forwards are filled up to, where that gives a row the same bits.
FILLED_ROWS = (4, 12, 16, 24, 32)

DEPENDENT_ROWS = "rows depend on co-batched requests in the last bits"
# Rows that are filled up need a mask, which brings other kernels, and these sum in blocks that
# depend on the longest row. A few trials would not tell: of pairs of lengths some agree on a CPU.
DEPENDENT_LENGTHS = (
    "rows depend on the sizes and prompts of co-batched requests in the last bits; "
    "engine.mix_lengths: false keeps these apart"
)

# What a forward is tried with: enough for different content, and few enough to start soon.
TRIED_CALLS = 8


@dataclass(frozen=True)
class SharingPlan:
    """How requests share forwards.

    Args:
        serial: they do not: they run one at a time.
        inline: components that run inside a call, unparked.
        max_rows: most rows of a shared forward that keep images as they are; 0: any number.
        filled_rows: for the sake of equal bytes every shared forward is filled up to the next of
            these, and has no more rows than the last; empty: any row count.
        row_buckets: where there are none, forwards are filled up to the next of these; empty: not
            at all.
        pads_prompts: whether texts are filled up as far as the model's rules say, so that requests
            share forwards whatever their prompts.
        mixes_lengths: whether rows of different lengths share forwards, where a module takes them.
        same_bytes: whether an image is the same in every bit at any load, on this device.
        remark: why it is not the usual plan; for people.
    """

    serial: bool = False
    inline: frozenset[str] = frozenset()
    max_rows: int = 0
    filled_rows: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    pads_prompts: bool = True
    mixes_lengths: bool = True
    same_bytes: bool = True
    remark: str = ""

    @property
    def row_policy(self) -> str:
        """In a few words, for fingerprints: images of different policies may differ."""
        if self.serial:
            return "one request at a time"
        buckets = self.filled_rows or self.row_buckets
        rows = f"filled up to {', '.join(map(str, buckets))} rows" if buckets else "any rows"
        return rows if self.pads_prompts else f"{rows}, prompts not padded"

    @property
    def has_one_row_count(self) -> bool:
        """Whether there is nothing to measure: every forward has the same number of rows."""
        return len(self.filled_rows) == 1

    def for_graphs(self, max_rows: int) -> SharingPlan:
        """This plan where forwards run compiled graphs, which are made for few row counts."""
        if self.serial:
            return self
        if self.filled_rows:
            # One graph instead of many.
            usual = FIXED_ROWS in self.filled_rows
            buckets = (FIXED_ROWS if usual else self.filled_rows[-1],)
            return replace(self, filled_rows=buckets, row_buckets=buckets)
        return replace(self, row_buckets=row_buckets(max_rows))

    def parking(self, options: ParkingOptions) -> ParkingOptions:
        """`options` as this plan wants them."""
        options = replace(options, bucket_rows=self.row_buckets)
        if self.filled_rows:
            most = self.filled_rows[-1]
            options = replace(options, max_rows=most, bucket_rows=self.filled_rows)
        elif self.max_rows:
            options = replace(options, max_rows=min(options.max_rows, self.max_rows))
        return replace(
            options,
            inline=self.inline,
            pads_prompts=self.pads_prompts,
            mixes_lengths=self.mixes_lengths,
        )


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Powers of two up to `max_rows`, and that itself: few graphs, at most half of one unused.

    There is none of one row: the compiler makes other kernels for it, which round differently, so
    that the bits of an image would depend on what it shares forwards with.
    """
    powers = (2**n for n in range(1, max_rows.bit_length()))
    return tuple(sorted({*(rows for rows in powers if rows < max_rows), max_rows}))


def plan_sharing(
    pipeline: Any,
    probes: Sequence[ProbeRequest],
    max_rows: int,
    fix_rows: bool = True,
    row_buckets: tuple[int, ...] = (),
    pad_prompts: bool = True,
    mix_lengths: bool = True,
) -> SharingPlan:
    """Find out how requests of a pipeline may share forwards.

    Run it on the engine's thread, before the pipeline is attached to the engine.

    Args:
        pipeline: a resident one.
        probes: small requests that differ, of every task that it serves.
        max_rows: most rows of one shared forward.
        fix_rows: whether forwards may be filled up for the sake of equal bytes.
        row_buckets: what forwards are to be filled up to in any case.
        pad_prompts: whether texts are filled up.
        mix_lengths: whether rows of different lengths may share forwards, where a module takes
            them.
    """
    plan = plan_co_batching(pipeline, probes)
    if plan.serial:
        return plan
    pads_prompts = pad_prompts or not fills_text(pipeline)
    mixes_lengths = mix_lengths or not takes_lengths(pipeline)
    plan = replace(
        plan, row_buckets=row_buckets, pads_prompts=pads_prompts, mixes_lengths=mixes_lengths
    )
    if mix_lengths and takes_lengths(pipeline):
        return _without_same_bytes(plan, DEPENDENT_LENGTHS)
    with parked_at(Stage.DENOISE, pipeline, probes, plan.parking(ENOUGH_ROWS)) as groups:
        tried = [calls for group in groups for calls in calls_to_try(group, max_rows)]
        found = same_bits(tried, max_rows, fix_rows)
    if found is None:
        return _without_same_bytes(plan, DEPENDENT_ROWS)
    return replace(plan, max_rows=found.most, filled_rows=found.filled)


def _without_same_bytes(plan: SharingPlan, remark: str) -> SharingPlan:
    remarks = filter(None, [plan.remark, remark])
    return replace(plan, same_bytes=False, remark="; ".join(remarks))


def plan_co_batching(
    pipeline: Any,
    probes: Sequence[ProbeRequest],
    verified: Collection[str] = VERIFIED,
    plain: PlainRun | None = None,
) -> SharingPlan:
    """Whether requests may run at once, and which components must run inside a call.

    Args:
        pipeline: a resident one.
        probes: small requests that differ.
        verified: classes of pipelines that need no probe of requests at once.
        plain: what the probes gave one after another, if they were run before.
    """
    plain = plain or run_plainly(pipeline, probes)
    changed = plain.changed
    stepped = {path for path, _, rule in parkable_methods(pipeline) if rule.shared}
    if changed & stepped:
        names = ", ".join(sorted(changed & stepped))
        return SharingPlan(serial=True, remark=f"a call changes {names} while it runs")
    remark = f"{', '.join(sorted(changed))}: changed by a call, so runs inside it"
    plan = SharingPlan(inline=changed, remark=remark if changed else "")
    if type(pipeline).__name__ in verified:
        return plan
    report = check_sharing(pipeline, probes, plain, options=plan.parking(ENOUGH_ROWS))
    if report.objection:
        return replace(plan, serial=True, remark=report.objection)
    return plan


@dataclass(frozen=True)
class RowCounts:
    """Forwards that give a row the same bits whatever shares the forward.

    Args:
        most: rows of the largest.
        filled: row counts that they are filled up to; empty where any will do.
    """

    most: int
    filled: tuple[int, ...] = ()


def same_bits(tried: Sequence[Sequence[Call]], max_rows: int, fix_rows: bool) -> RowCounts | None:
    """Which forwards of up to `max_rows` rows give every call the same bits; None if none do.

    Args:
        tried: calls that could share a forward, in groups of one shape.
        fix_rows: whether forwards may be filled up for that.
    """
    fixed_rows = min(FIXED_ROWS, max_rows)
    rows = max_rows
    for calls in tried:
        if rows >= fixed_rows:
            rows = independent_rows(calls, rows)
    if rows >= fixed_rows:
        return RowCounts(rows)
    counts = (fixed_rows, *(rows for rows in FILLED_ROWS if rows <= max_rows)) if fix_rows else ()
    for calls in tried:
        counts = agreeing_row_counts(calls, counts) if counts else ()
    filled = tuple(sorted(set(counts)))
    return RowCounts(filled[-1], filled) if filled else None


def calls_to_try(group: Sequence[Call], max_rows: int) -> Iterator[list[Call]]:
    """Calls of layers that a few rows show little of, then of the whole module."""
    generator = torch.Generator().manual_seed(0)
    yield from vector_layer_calls(group[0], max_rows, generator)
    # At the first step all timesteps are the same: others are tried, too.
    others = [varied(group[i % len(group)], generator) for i in range(TRIED_CALLS - len(group))]
    yield [*group, *others]
