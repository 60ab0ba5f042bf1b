"""Images per second with a step cache and without, and what deciding takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheUse
from stepserve.engine.batch_invariance import run_together
from stepserve.engine.calls.call import Call
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache, read_decisions
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.parking import ParkingOptions
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.serving.runner import PipelineRunner

from loadtests.engine_bench import over_neighbours, run_engine
from loadtests.step_cache.quality import Way, request_of

DECIDED = 200
FORWARDS = 7


@dataclass(frozen=True)
class Speed:
    """Saturated images per second, by repeat, in turns.

    Args:
        whole: nothing is skipped. One more than of the others, which lie between them.
        cached: with the step cache.
        forwards: of the denoiser for each image that had one: the mean.
    """

    whole: tuple[float, ...]
    cached: tuple[float, ...]
    forwards: float

    @property
    def gain(self) -> float:
        """Median of what each turn gains over those around it."""
        return statistics.median(over_neighbours(self.cached, self.whole))


@dataclass(frozen=True)
class Deciding:
    """What a step cache takes for one step.

    Args:
        decide_s: seconds for one step: to decide, and to predict an output or to keep one.
        step_s: seconds of the denoiser for one step of one request, among as many as share a
            forward.
    """

    decide_s: float
    step_s: float

    @property
    def share(self) -> float:
        """Of a step."""
        return self.decide_s / self.step_s


def measure_speed(
    runner: PipelineRunner, way: Way, prompts: Sequence[str], requests: int, repeats: int
) -> Speed:
    """Many requests at once, with and without the way's cache, in turns.

    Args:
        runner: of the model in the precision that it is served in.
        way: with a step cache.
        prompts: in turns.
        requests: at once: several times as many as share a forward.
        repeats: of each.
    """
    cached = [
        request_of(runner, way, prompts[i % len(prompts)], i, f"{way}: {i}")
        for i in range(requests)
    ]
    whole = [replace(request, step_cache=None) for request in cached]
    _images_per_s(runner, whole[: requests // 4])
    rates: dict[bool, list[float]] = {True: [], False: []}
    finished: list[Finished] = []
    for turn in range(2 * repeats + 1):
        has_cache = turn % 2 == 1
        rate, ended = _images_per_s(runner, cached if has_cache else whole)
        rates[has_cache].append(rate)
        finished = ended if has_cache else finished
        print(f"  {'cached' if has_cache else 'whole'}: {rate:.2f} images per second", flush=True)
    forwards = statistics.mean(f.timings.denoiser_calls_run for f in finished)
    return Speed(tuple(rates[False]), tuple(rates[True]), forwards)


def _images_per_s(
    runner: PipelineRunner, requests: list[GenerationRequest]
) -> tuple[float, list[Finished]]:
    seconds, finished = run_engine(runner, requests)
    return len(requests) / seconds, finished


def measure_deciding(model: LoadedModel, use: StepCacheUse, rows: int) -> Deciding:
    """What a step's decision takes on the thread of an engine, beside the step itself.

    Args:
        model: no engine has it.
        use: of which method.
        rows: that share a forward.
    """
    options = ParkingOptions(max_rows=rows, prompt_cache_bytes=0)
    probes = make_probe_requests(model)
    with parked_at(Stage.DENOISE, model.pipeline, probes, options) as groups, torch.no_grad():
        call = max((call for group in groups for call in group), key=lambda call: call.rows)
        calls = [call] * max(rows // call.rows, 1)
        output = run_together(calls, 0)[0]
        step_s = _median_s(partial(run_together, calls, 0), FORWARDS) / len(calls)
        return Deciding(_seconds_of_a_decision(use, call, output), step_s)


def _median_s(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def _seconds_of_a_decision(use: StepCacheUse, call: Call, output: Any) -> float:
    """The mean of steps that run and steps that are skipped, in turns."""
    cache = StepCache(replace(use, threshold=0.0), [CachedPhase(DECIDED + 1)])
    seconds = []
    for step in range(DECIDED):
        started_s = time.perf_counter()
        pending = cache.expect(call)
        read_decisions([pending.decision])
        if step < 4 or step % 2:
            pending.learn(output)
        else:
            pending.predict()
        seconds.append(time.perf_counter() - started_s)
    # The first steps decide nothing.
    told = seconds[4:]
    return statistics.median(map(statistics.mean, zip(told[::2], told[1::2], strict=False)))
