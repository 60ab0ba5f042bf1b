"""Runs the requests of one family at once and alone, in several precisions, and compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from stepserve.engine.batch_invariance import independent_rows
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.loop.execution import Execution
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.modules.parking import ParkingOptions, fills_text
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    PlainRun,
    ProbeRequest,
    SharingReport,
    check_sharing,
    run_at_once,
    run_plainly,
)
from stepserve.pipelines.probing.sharing_plan import (
    SharingPlan,
    calls_to_try,
    plan_co_batching,
)
from torch import Tensor

from families.family import Family, Variation, resident

STAGGERED = (0, 1, 3, 6, 7, 9)
UNMERGED = replace(ENOUGH_ROWS, max_rows=1)


@dataclass(frozen=True)
class Findings:
    """What came of one family.

    Args:
        pipeline: name of its class.
        plan: how its requests share forwards.
        float64: all at once; None if it does not run in float64.
        together: all at once, in float32.
        staggered: arriving one after another, in float32.
        unmerged: at once, but every call in a forward of its own, in float32.
        bfloat16: at once; None if it does not run in bfloat16. Compared with calls that an engine
            runs one after another, where it fills texts up.
        independent: whether bfloat16 rows have the same bits in any company, on this device; not
            looked at where the report says that all have.
    """

    pipeline: str
    plan: SharingPlan
    float64: SharingReport | None
    together: SharingReport
    staggered: SharingReport
    unmerged: SharingReport
    bfloat16: SharingReport | None
    independent: bool


def examine(family: Family) -> Findings:
    """Run everything. It takes seconds."""
    pipeline = resident(family)
    probes = make_probe_requests(family, pipeline)
    plain = run_plainly(pipeline, probes)
    plan = make_plan(family, pipeline, probes, plain)
    check = partial(check_sharing, pipeline, probes, plain, one_at_a_time=plan.serial)
    bfloat16, independent = examine_bfloat16(family)
    return Findings(
        type(pipeline).__name__,
        plan,
        examine_float64(family),
        check(options=plan.parking(ENOUGH_ROWS)),
        check(options=plan.parking(ENOUGH_ROWS), arrivals=STAGGERED[: len(probes)]),
        check(options=plan.parking(UNMERGED)),
        bfloat16,
        independent,
    )


def make_probe_requests(family: Family, pipeline: Any) -> list[ProbeRequest]:
    """Its requests, each with a scheduler of its own."""
    return [partial(_call, family, pipeline, variation) for variation in family.variations()]


def make_plan(
    family: Family, pipeline: Any, probes: list[ProbeRequest], plain: PlainRun
) -> SharingPlan:
    """As of a class that nobody has verified; those that should share are tried by the caller."""
    verified = {type(pipeline).__name__} if family.shares else ()
    return plan_co_batching(pipeline, probes, verified, plain)


def examine_float64(family: Family) -> SharingReport | None:
    """In double precision only mistakes are left."""
    if not family.float64:
        return None
    pipeline = family.build().to(torch.float64)
    probes = make_probe_requests(family, pipeline)
    plain = run_plainly(pipeline, probes)
    plan = make_plan(family, pipeline, probes, plain)
    options = plan.parking(ENOUGH_ROWS)
    return check_sharing(pipeline, probes, plain, options=options, one_at_a_time=plan.serial)


def examine_bfloat16(family: Family) -> tuple[SharingReport | None, bool]:
    """All at once in bfloat16, and whether rows are independent there.

    Texts that are filled up round otherwise than in a plain call. Then requests at once are
    compared with what each gets from an engine alone.
    """
    if not family.bfloat16:
        return None, False
    pipeline = family.build().to(torch.bfloat16)
    probes = make_probe_requests(family, pipeline)
    plain = run_plainly(pipeline, probes)
    plan = make_plan(family, pipeline, probes, plain)
    options = plan.parking(ENOUGH_ROWS)
    if fills_text(pipeline):
        plain = replace(plain, results=results_alone(pipeline, probes, options))
    report = check_sharing(pipeline, probes, plain, options=options, one_at_a_time=plan.serial)
    # Where all bits are the same there is nothing to excuse, and to look for excuses takes long.
    return report, report.difference > 0 and has_independent_rows(pipeline, probes, options)


def results_alone(
    pipeline: Any, probes: list[ProbeRequest], options: ParkingOptions
) -> list[Tensor]:
    """What an engine gives each request while there is no other."""
    batcher = Batcher(len(probes), Execution(one_at_a_time=True))
    with torch.no_grad():
        listeners = run_at_once(batcher, pipeline, probes, [0] * len(probes), options)
    return [listener.result for listener in listeners]


def has_independent_rows(
    pipeline: Any, probes: list[ProbeRequest], options: ParkingOptions
) -> bool:
    """Whether rows have the same bits in any company, on this device."""
    with parked_at(Stage.DENOISE, pipeline, probes, options) as groups:
        # No forward of these probes has more rows.
        most = max((sum(call.rows for call in group) for group in groups), default=1)
        tried = [calls for group in groups for calls in calls_to_try(group, most)]
        return all(independent_rows(calls, most) >= most for calls in tried)


def _call(family: Family, pipeline: Any, variation: Variation) -> Tensor:
    copied = copy_pipeline(pipeline)
    if family.schedulers:
        name = family.schedulers[variation.index % len(family.schedulers)]
        scheduler: Callable[..., Any] = getattr(diffusers, name).from_config
        copied.scheduler = scheduler(copied.scheduler.config)
    return family.result(copied(**family.arguments(copied, variation)))
