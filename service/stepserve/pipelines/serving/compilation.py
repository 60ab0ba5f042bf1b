"""Compiling the denoiser of a model before it serves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepserve.domain.errors import StepserveError
from stepserve.domain.models import Compilation
from stepserve.engine.batch_invariance import independent_rows
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.stacking import stack
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.modules.call_shapes import Example, UniformArguments, shape_of
from stepserve.pipelines.modules.compiling import Backend, CompiledForward
from stepserve.pipelines.modules.parking import components_of
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, ProbeRequest
from stepserve.pipelines.probing.sharing_plan import SharingPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """What came of compiling a denoiser.

    Args:
        state: whether compiled code serves.
        remark: why it does not; for people.
        forwards: by path of a component, what runs in place of its eager forward.
        same_bytes: whether compiled rows have the same bits whatever they share a forward with.
    """

    state: Compilation
    remark: str = ""
    forwards: Mapping[str, CompiledForward] = field(default_factory=dict)
    same_bytes: bool = False


def compile_denoiser(
    pipeline: Any,
    plan: SharingPlan,
    probes: Sequence[ProbeRequest],
    row_limit: int,
    backend: Backend,
) -> Compiled:
    """Compile one graph for each row count that shared forwards of the native size may have.

    Run it on the engine's thread, while no call of the pipeline parks.

    Args:
        pipeline: a resident one.
        plan: how its forwards are shared, with row buckets.
        probes: small requests of every task that it serves.
        row_limit: most rows of a shared forward.
        backend: as `torch.compile` takes it.
    """
    if plan.serial:
        return _failed(f"requests run one at a time: {plan.remark}")
    denoiser = denoiser_of(pipeline)
    path = next(path for path, module in components_of(pipeline) if module is denoiser)
    try:
        with parked_at(Stage.DENOISE, pipeline, probes, plan.parking(ENOUGH_ROWS)) as parked:
            groups = [calls for calls in parked if calls[0].method.module == path]
            return _compile(path, groups, plan, row_limit, backend)
    except StepserveError as error:
        return _failed(str(error))
    except Exception as error:
        # Torch writes what failed on the first line, why on the second, and much below.
        reason = " ".join(str(error).strip().splitlines()[:2])
        logger.warning("torch.compile failed: %s: %s", type(error).__name__, reason)
        return _failed(f"torch.compile failed ({type(error).__name__}); the log says why")


def _compile(
    path: str, groups: Sequence[list[Call]], plan: SharingPlan, row_limit: int, backend: Backend
) -> Compiled:
    if not groups:
        return _failed("no call of the denoiser was seen to compile it for")
    # What the parked method runs is the forward as it was before it parked.
    eager = groups[0][0].method.run
    examples = list(_examples(UniformArguments(eager), groups, plan.row_buckets, row_limit))
    forward = CompiledForward(eager, examples, backend)
    same_bytes = all(_is_independent(calls, forward, row_limit) for calls in groups)
    logger.info("the denoiser is served by compiled code: %d graphs", len(examples))
    return Compiled(Compilation.COMPILED, "", {path: forward}, same_bytes)


def _examples(
    uniform: UniformArguments, groups: Sequence[list[Call]], buckets: Sequence[int], row_limit: int
) -> Iterator[Example]:
    """One call of each shape that shared forwards may have, the fewest rows first."""
    seen = set()
    for rows in buckets:
        for calls in groups:
            call = min(calls, key=lambda call: call.rows)
            # Beyond the row limit there are only requests that are larger by themselves.
            most = call.method.padded_rows(min(row_limit, call.method.max_rows))
            if not call.rows <= rows <= most:
                continue
            example = uniform(*stack([call], rows))
            if shape_of(example) not in seen:
                seen.add(shape_of(example))
                yield example


def _is_independent(calls: Sequence[Call], forward: CompiledForward, row_limit: int) -> bool:
    most = min(row_limit, calls[0].method.max_rows)
    method = replace(calls[0].method, run=forward)
    return independent_rows([replace(call, method=method) for call in calls], most) >= most


def _failed(reason: str) -> Compiled:
    logger.warning("the denoiser is served by eager code: %s", reason)
    return Compiled(Compilation.FAILED, reason)
