"""One request of a family with a step cache: through plain diffusers, and through a batcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import torch
from families.family import Family, Variation
from plain_step_cache import (
    CONTROL,
    Decision,
    PlainStepCache,
    replaced,
    skipping,
    stand_in,
)
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.domain.timings import Timings
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, difference
from torch import Tensor, nn

# Of requests that are in flight at once: at which tick each begins.
ARRIVALS = (0, 2, 5, 9)
UNKNOWN = 10**6


@dataclass(frozen=True)
class PlainResult:
    """What a plain call with a step cache made, and what ran in it."""

    image: Tensor
    ran: tuple[bool, ...]
    calls: tuple[tuple[str, float], ...]

    @property
    def pattern(self) -> str:
        """One letter for each evaluation."""
        return "".join("x" if ran else "." for ran in self.ran)


@dataclass
class Recorder:
    """Keeps how a request ends, as a listener of the engine."""

    result: Any = None
    error: BaseException | None = None
    timings: Timings = field(default_factory=Timings)

    def accepted(self, position: int, expected_s: float) -> None:
        """Nobody waits for it."""

    def started(self) -> None:
        """Nobody waits for it."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The pipeline call returned."""
        self.result, self.timings = result, timings

    def failed(self, error: BaseException, timings: Timings) -> None:
        """The pipeline call raised."""
        self.error = error


@dataclass
class Bench:
    """Requests of one family, over one pipeline.

    Args:
        family: whose requests they are.
        pipeline: of the precision that is looked at.
        scheduler: a class by name; empty: the pipeline's own.
        steps: of each request.
    """

    family: Family
    pipeline: Any
    scheduler: str = ""
    steps: int = 12
    _whole: dict[Variation, PlainResult] = field(default_factory=dict)

    @property
    def order(self) -> int:
        """How many evaluations a step of the solver takes."""
        return getattr(self.copied().scheduler, "order", 1)

    @property
    def stepped(self) -> dict[str, nn.Module]:
        """The modules that are called at each step."""
        modules = {name: getattr(self.pipeline, name, None) for name in (CONTROL, self.denoiser)}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def denoiser(self) -> str:
        """The component's name."""
        return self.family.denoiser

    def variation(self, index: int = 0) -> Variation:
        """One of several requests that differ in all but the number of steps."""
        return replace(self.family.variations(index + 1)[index], num_inference_steps=self.steps)

    def copied(self) -> Any:
        """A pipeline with a scheduler of its own."""
        copied = copy_pipeline(self.pipeline)
        if self.scheduler:
            scheduler = getattr(diffusers, self.scheduler)
            copied.scheduler = scheduler.from_config(copied.scheduler.config)
        return copied

    def call(self, pipeline: Any, variation: Variation) -> Tensor:
        """One ordinary call."""
        return self.family.result(pipeline(**self.family.arguments(pipeline, variation)))

    def plainly(
        self, variation: Variation, decision: Decision, evaluations: int = UNKNOWN
    ) -> PlainResult:
        """A call without an engine."""
        pipeline = self.copied()
        with (
            torch.no_grad(),
            skipping(pipeline.scheduler, self.stepped, evaluations, decision) as cache,
        ):
            image = self.call(pipeline, variation)
        return PlainResult(image, tuple(cache.ran), tuple(cache.calls))

    def whole(self, variation: Variation) -> PlainResult:
        """A call of which nothing is skipped."""
        if variation not in self._whole:
            self._whole[variation] = self.plainly(variation, Decision())
        return self._whole[variation]

    def cached(self, variation: Variation, decision: Decision) -> PlainResult:
        """A call without an engine of which something is skipped, and something else is not."""
        whole = self.whole(variation)
        result = self.plainly(variation, decision, len(whole.ran))
        assert len(result.ran) == len(whole.ran)
        free = result.ran[3 * self.order : -self.order]
        assert any(free), f"nothing runs but what must: {result.pattern}"
        assert not all(free), f"nothing is skipped: {result.pattern}"
        assert difference(result.image, whole.image) > 0
        return result

    def step_cache(self, variation: Variation, decision: Decision) -> StepCache:
        """What makes a track skip the same."""
        whole = self.whole(variation)
        calls = sum(name != CONTROL for name, _ in whole.calls)
        threshold = decision.threshold
        phase = CachedPhase(
            calls,
            calls // len(whole.ran),
            self.order,
            decision.skipped if threshold is None else None,
        )
        method = StepCacheMethod.MAGCACHE if threshold is None else StepCacheMethod.EASYCACHE
        return StepCache(StepCacheUse(method, threshold or 1.0), [phase])

    def track(
        self, name: str, variation: Variation, cache: StepCache | None
    ) -> tuple[Track, Recorder]:
        """A request as the engine wants it."""
        recorder = Recorder()
        run = partial(self.call, self.copied(), variation)
        calls = 1 if cache is None else cache.phases[0].calls
        return Track(name, 1, (Phase(calls),), 1, run, recorder, step_cache=cache), recorder

    def served(
        self, tracks: Sequence[Track], arrivals: Sequence[int] = ARRIVALS
    ) -> list[tuple[str, float]]:
        """Run tracks through a batcher; returns what forwards really ran, with their timesteps."""
        waiting = sorted(zip(arrivals, range(len(tracks)), strict=False))
        batcher, tick = Batcher(len(tracks)), 0
        with torch.no_grad(), self._watching() as forwards:
            while waiting or batcher.scheduler.tracks:
                while waiting and waiting[0][0] <= tick:
                    batcher.scheduler.add(tracks[waiting.pop(0)[1]])
                batcher.tick()
                tick += 1
        assert batcher.counters.retries == 0
        return forwards

    @contextmanager
    def _watching(self) -> Iterator[list[tuple[str, float]]]:
        # It asks for nothing to be skipped, and keeps what runs below the engine.
        seen = PlainStepCache(UNKNOWN, 1, Decision())
        with ExitStack() as undo:
            for name, module in self.stepped.items():
                undo.enter_context(replaced(module, "forward", partial(stand_in, seen, name)))
            undo.callback(wrap_modules(self.pipeline, Wrappers(parking=ENOUGH_ROWS)))
            yield seen.calls
