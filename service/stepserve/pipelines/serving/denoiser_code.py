"""Which code runs the denoiser for which request: eager at first, compiled once that is ready.

Eager and compiled code round differently, so an image is never made by both: a request keeps the
code that was in use when it was submitted, and the engine runs requests of different code in
different forwards, as it does with adapters. Nobody waits for the change.

Forwards are filled up to row buckets from the start, whichever code runs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from stepserve.domain.models import Compilation
from stepserve.engine.batch_invariance import independent_rows, run_together
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.stacking import stack
from stepserve.engine.loop.engine import Engine
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.modules.attach import components_of
from stepserve.pipelines.modules.call_shapes import Example, UniformArguments, shape_of
from stepserve.pipelines.modules.compiling import (
    BackgroundCompiler,
    CompileState,
    Forward,
    SwitchableForward,
    row_buckets,
)
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, Trial
from stepserve.pipelines.probing.sharing_plan import FIXED_ROWS, SharingPlan

logger = logging.getLogger(__name__)


class Code(StrEnum):
    """What runs the denoiser; a fingerprint tells it."""

    EAGER = "eager"
    COMPILED = "compiled"
    # Graphs were given up while the request was at work.
    BOTH = "compiled, then eager"


class DenoiserCode:
    """The code of one model's denoiser.

    Args:
        pipeline: a resident one.
        forward: what was installed on its denoiser when it was loaded.
        engine: that runs it.
    """

    def __init__(self, pipeline: Any, forward: SwitchableForward, engine: Engine) -> None:
        self.same_bytes = False
        self._pipeline = pipeline
        self._forward = forward
        self._engine = engine
        self._path = next(p for p, m in components_of(pipeline) if m is forward.module)
        self._calls: list[list[Call]] = []
        self._compiler: BackgroundCompiler | None = None
        # Why it is not even tried.
        self._objection = ""
        self._in_service = False
        self._threads = 1

    @property
    def in_use(self) -> Code:
        """What requests get that are submitted now."""
        ready = self._compiler is not None and self._compiler.state is CompileState.READY
        return Code.COMPILED if self._in_service and ready else Code.EAGER

    def outcome(self, code: Code) -> Code:
        """What ran a request that has ended, and was submitted when `code` was in use."""
        return Code.BOTH if code is Code.COMPILED and self.in_use is Code.EAGER else code

    @property
    def state(self) -> Compilation:
        """How far the compilation is."""
        if self._objection or (self._compiler and self._compiler.state is CompileState.FAILED):
            return Compilation.FAILED
        return Compilation.COMPILED if self.in_use is Code.COMPILED else Compilation.COMPILING

    @property
    def remark(self) -> str:
        """What is to be said of the state."""
        compiler = self._compiler
        if compiler is None:
            return self._objection or "begins when the model is warm"
        if self.state is Compilation.COMPILING:
            return f"{compiler.graphs_ready} of {compiler.graphs_wanted} graphs are ready"
        return compiler.public_reason

    def forward_of(self, code: Hashable) -> Forward:
        """What runs requests of that code; eager code runs those of none."""
        if code is Code.COMPILED and self._compiler is not None:
            return self._compiler.run
        return self._forward.eager

    def enter(self) -> dict[str, Callable[[Hashable], None]]:
        """By component, what sets it to the code of a request."""
        return {self._path: self._set}

    def examine(self, plan: SharingPlan, trials: Sequence[Trial], max_rows: int) -> SharingPlan:
        """Look at the calls to compile for; returns the plan with the row buckets to be used.

        Run it on the engine's thread, before the pipeline is attached to the engine.
        """
        # A graph is made for a number of threads: the engine's.
        self._threads = torch.get_num_threads()
        if plan.alone:
            self._objection = f"requests run one at a time: {plan.remark}"
            return plan
        buckets = row_buckets(max_rows)
        if plan.filled_rows:
            # One graph instead of many.
            usual = FIXED_ROWS in plan.filled_rows
            buckets = (FIXED_ROWS if usual else plan.filled_rows[-1],)
            plan = replace(plan, filled_rows=buckets)
        plan = replace(plan, row_buckets=buckets)
        with parked_at(Stage.DENOISE, self._pipeline, trials, plan.parking(ENOUGH_ROWS)) as groups:
            self._calls = [calls for calls in groups if calls[0].method.module == self._path]
        if not self._calls:
            self._objection = "no call of the denoiser was seen to compile it for"
            return plan
        # Smaller ones could not be compiled: nobody was seen to make such calls.
        fewest = max(min(call.rows for call in calls) for calls in self._calls)
        return replace(plan, row_buckets=tuple(rows for rows in buckets if rows >= fewest))

    def start_compiling(self, plan: SharingPlan, backend: str | Callable[..., Any]) -> None:
        """Compile in the background, and put compiled code in service when all is ready."""
        if self._objection:
            logger.warning("the denoiser is served by eager code: %s", self._objection)
            return
        examples = list(self._examples(plan.row_buckets))
        self._compiler = BackgroundCompiler(
            self._forward.eager,
            examples,
            self._put_in_service,
            self._threads,
            backend,
        )
        self._compiler.start()

    def wait(self, timeout_s: float | None = None) -> Compilation:
        """Wait until the compilation has ended, or until the time is over."""
        if self._compiler is not None:
            self._compiler.wait(timeout_s)
        return self.state

    def stop(self) -> None:
        """Make no further graph. Does not wait for the one that is being made."""
        if self._compiler is not None:
            self._compiler.stop()

    def _set(self, code: Hashable) -> None:
        self._forward.switch(self.forward_of(code))

    def _examples(self, buckets: Sequence[int]) -> Iterator[Example]:
        """One call of each shape that shared forwards may have, the fewest rows first."""
        uniform = UniformArguments(self._forward.eager)
        seen = set()
        for rows in buckets:
            for calls in self._calls:
                call = min(calls, key=lambda call: call.rows)
                # Beyond the row limit there are only requests that are larger by themselves.
                if rows > call.method.padded_rows(self._row_limit(call)):
                    continue
                example = uniform(*stack([call], rows))
                if shape_of(example) not in seen:
                    seen.add(shape_of(example))
                    yield example

    def _row_limit(self, call: Call) -> int:
        return min(self._engine.row_limit, call.method.max_rows)

    def _put_in_service(self, run: Forward) -> None:
        """Called by the compiling thread, and by the engine's should a graph not fit after all."""
        if run == self._forward.eager:
            self._forward.switch(run)
            return
        limits = [(calls, self._row_limit(calls[0])) for calls in self._calls]
        self.same_bytes = all(
            independent_rows(calls, limit, self._run_compiled) >= limit for calls, limit in limits
        )
        assert self._compiler is not None
        if self._compiler.state is CompileState.READY:
            self._calls = []
            self._in_service = True
            logger.info("the denoiser is served by compiled code")

    def _run_compiled(self, calls: Sequence[Call], padded_rows: int) -> list[Any]:
        """On the engine's thread, one forward at a time: requests go on between them."""
        return self._engine.call(partial(self._run_compiled_now, calls, padded_rows))

    def _run_compiled_now(self, calls: Sequence[Call], padded_rows: int) -> list[Any]:
        self._set(Code.COMPILED)
        return run_together(calls, padded_rows)
