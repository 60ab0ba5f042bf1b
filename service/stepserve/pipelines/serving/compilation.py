"""Compiling the denoiser of a model before it serves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stepserve.domain.errors import StepserveError
from stepserve.domain.models import Compilation
from stepserve.engine.batch_invariance import independent_rows
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.call_key import CallArguments
from stepserve.engine.calls.stacking import stack
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.modules.compiling import (
    Backend,
    CompiledForward,
    UniformArguments,
    shape_of,
)
from stepserve.pipelines.modules.parking import components_of
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS
from stepserve.pipelines.serving.preparation import Preparation

logger = logging.getLogger(__name__)


def compile_denoiser(prepared: Preparation, row_limit: int, backend: Backend) -> Preparation:
    """Compile one graph for each row count that shared forwards of the native size may have.

    Run it on the engine's thread, while no call of the pipeline parks.

    Args:
        prepared: a model whose plan has row buckets.
        row_limit: most rows of a shared forward.
        backend: as `torch.compile` takes it.

    Returns:
        The same with compiled code; where that fails, with the remark that says why.
    """
    pipeline, plan = prepared.model.pipeline, prepared.plan
    if plan.serial:
        return _failed(prepared, f"requests run one at a time: {plan.remark}")
    denoiser = denoiser_of(pipeline)
    path = next(path for path, module in components_of(pipeline) if module is denoiser)
    parking = plan.parking(ENOUGH_ROWS)
    try:
        with parked_at(Stage.DENOISE, pipeline, prepared.probes, parking) as parked:
            groups = [calls for calls in parked if calls[0].method.module == path]
            return _compile(prepared, path, groups, row_limit, backend)
    except StepserveError as error:
        return _failed(prepared, str(error))
    except Exception as error:
        # Torch writes what failed on the first line, why on the second, and much below.
        reason = " ".join(str(error).strip().splitlines()[:2])
        logger.warning("torch.compile failed: %s: %s", type(error).__name__, reason)
        remark = f"torch.compile failed ({type(error).__name__}); the log says why"
        return _failed(prepared, remark)


def _compile(
    prepared: Preparation,
    path: str,
    groups: Sequence[list[Call]],
    row_limit: int,
    backend: Backend,
) -> Preparation:
    if not groups:
        return _failed(prepared, "no call of the denoiser was seen to compile it for")
    # What the parked method runs is the forward as it was before it parked.
    eager = groups[0][0].method.run
    buckets = prepared.plan.row_buckets
    examples = list(_examples(UniformArguments(eager), groups, buckets, row_limit))
    forward = CompiledForward(eager, examples, backend)
    same_bytes = all(_is_independent(calls, forward, row_limit) for calls in groups)
    logger.info("the denoiser is served by compiled code: %d graphs", len(examples))
    fingerprint = prepared.model.capabilities.fingerprint
    return replace(
        _with(
            prepared,
            compilation=Compilation.COMPILED,
            same_bytes=same_bytes,
            fingerprint=None if fingerprint is None else replace(fingerprint, code="compiled"),
        ),
        wrappers=replace(prepared.wrappers, compiled={path: forward}),
    )


def _examples(
    uniform: UniformArguments, groups: Sequence[list[Call]], buckets: Sequence[int], row_limit: int
) -> Iterator[CallArguments]:
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


def _failed(prepared: Preparation, reason: str) -> Preparation:
    logger.warning("the denoiser is served by eager code: %s", reason)
    return _with(prepared, compilation=Compilation.FAILED, compilation_remark=reason)


def _with(prepared: Preparation, **capabilities: Any) -> Preparation:
    model = prepared.model
    changed = replace(model.capabilities, **capabilities)
    return replace(prepared, model=replace(model, capabilities=changed))
