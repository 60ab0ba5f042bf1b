"""First forwards are slow, as kernels are chosen for each shape: better before serving.

Where the row limit is to be measured, it is measured here: steps of growing row counts are timed
until more rows bring no more throughput, or memory or time runs out, and the knee of that curve
becomes the limit.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import psutil
import torch

from stepserve.domain.errors import (
    CancelledError,
    ContentFilteredError,
    GenerationFailedError,
    StepserveError,
)
from stepserve.domain.events import Event, Failed, Finished, Preview
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.timings import Timings
from stepserve.engine.device_errors import is_out_of_memory
from stepserve.engine.scheduling.row_limits import knee
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.loading.weights import check_finite_weights
from stepserve.pipelines.probing.probe_requests import with_required_inputs
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.requests.inputs import decode_inputs
from stepserve.pipelines.serving.runner import PipelineRunner

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
# The first step of a row count is slow; of the others the fastest counts.
MEASURED_STEPS = 4
MEASURING_S = 6.0
TRIES = 3
# Where there is no time to find the knee; if memory does not suffice, the engine lowers it.
USUAL_ROWS = 32
# Of a machine's cores, while a model is measured on them. More, and what was measured is theirs.
MOST_FOR_OTHERS = 0.05


def warm_up(runner: PipelineRunner) -> float:
    """Run small requests of growing row counts through the engine; returns seconds taken.

    Raises:
        StepserveError: the model cannot make an image.
    """
    started_s = time.perf_counter()
    images = 1
    limit = min(runner.model.capabilities.max_n, runner.engine.row_ceiling // 2)
    _run_first(runner)
    while (images := 2 * images) <= limit:
        _run(runner, _request(runner, images))
    if runner.engine.options.max_rows is None and not runner.prepared.plan.has_one_row_count:
        _set_measured_limit(runner)
    # What is loaded by now stays: the garbage collector need not walk a million objects again and
    # again between two denoising steps.
    gc.collect()
    gc.freeze()
    return time.perf_counter() - started_s


@dataclass(frozen=True)
class Curve:
    """Seconds of one step by its rows.

    Args:
        cut_short: there was no time for more rows.
        disturbed: others took part of the machine meanwhile, as they do while a cluster starts.
    """

    seconds: dict[int, float]
    cut_short: bool = False
    disturbed: bool = False

    @property
    def row_limit(self) -> int:
        """The knee; at least the usual limit where it may lie beyond what was seen."""
        rows = knee(self.seconds)
        unseen = self.disturbed or (self.cut_short and rows == max(self.seconds))
        return max(rows, USUAL_ROWS) if unseen else rows

    @property
    def remark(self) -> str:
        """What to know about it, or nothing."""
        remarks = [
            "no time for more" if self.cut_short else "",
            "others were running" if self.disturbed else "",
        ]
        return ", ".join(filter(None, remarks))


@dataclass(frozen=True)
class CpuTimes:
    """Seconds that cores were busy since the machine started, and with this process."""

    taken_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> CpuTimes:
        """As the system counts them."""
        all_cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle_s = all_cores.idle + getattr(all_cores, "iowait", 0.0)
        return cls(time.monotonic(), sum(all_cores) - idle_s, own.user + own.system)

    def others_share(self, now: CpuTimes, cores: int) -> float:
        """Share of the machine that other processes had between this and `now`."""
        others_s = (now.busy_s - self.busy_s) - (now.own_s - self.own_s)
        return max(others_s / (cores * max(now.taken_s - self.taken_s, 1e-9)), 0.0)


def measure_steps(runner: PipelineRunner, most_s: float = MEASURING_S) -> Curve:
    """Time a step for as many rows as are worth trying, within about `most_s` seconds."""
    started_s = time.perf_counter()
    seconds: dict[int, float] = {}
    request = _request(runner, 1, MEASURED_STEPS)
    while (rows := _rows(runner, request)) <= runner.engine.row_ceiling:
        before_s = time.perf_counter()
        best = max((rows / each_s for rows, each_s in seconds.items()), default=0.0)
        step_s = _measure_fairly(runner, request, best)
        if step_s is None:
            break
        seconds[rows] = step_s
        if rows / step_s < best:
            break
        now_s = time.perf_counter()
        # Twice the rows will take about twice as long.
        if now_s + 2 * (now_s - before_s) - started_s > most_s:
            return Curve(seconds, cut_short=2 * rows <= runner.engine.row_ceiling)
        request = _request(runner, 2 * request.n, MEASURED_STEPS)
    return Curve(seconds)


def _measure_fairly(
    runner: PipelineRunner, request: GenerationRequest, rows_per_s: float
) -> float | None:
    """Seconds of one step; slower ones than `rows_per_s` are not believed at once.

    A machine that is busy with something else for a moment would otherwise have its replica serve
    a few rows at a time for as long as it lives.
    """
    fastest_s: float | None = None
    for _ in range(TRIES):
        step_s = _measure(runner, request)
        if step_s is None:
            return None
        fastest_s = step_s if fastest_s is None else min(fastest_s, step_s)
        if _rows(runner, request) / fastest_s >= rows_per_s:
            break
    return fastest_s


class Stopwatch:
    """Times the steps of one request, ends it after some, and says how it ended."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._device = device
        self._last_s = 0.0

    def step_ended(self, step: int, steps: int) -> None:
        """Called inside the pipeline after each step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now_s = time.perf_counter()
        if step > 1:
            self.seconds.append(now_s - self._last_s)
        self._last_s = now_s
        if step >= MEASURED_STEPS:
            raise CancelledError("measured")

    def accepted(self, position: int, expected_s: float) -> None:
        """Nobody waits for it."""

    def started(self) -> None:
        """Nobody waits for it."""

    def finished(self, result: Any, timings: Timings) -> None:
        """It had fewer steps than were wanted."""
        self.ended.put(None)

    def failed(self, error: BaseException, timings: Timings) -> None:
        """It was ended, or could not be done."""
        self.ended.put(None if isinstance(error, CancelledError) else error)


def _set_measured_limit(runner: PipelineRunner) -> None:
    before = CpuTimes.now()
    curve = measure_steps(runner)
    if not curve.seconds:
        return
    if runner.model.pipeline.device.type == "cpu":
        others_share = before.others_share(CpuTimes.now(), os.cpu_count() or 1)
        curve = replace(curve, disturbed=others_share > MOST_FOR_OTHERS)
    runner.engine.limit_rows(curve.row_limit)
    logger.info(
        "model %s: at most %d rows share a forward; milliseconds of a step by its rows: %s%s",
        runner.model.capabilities.id,
        runner.engine.row_limit,
        ", ".join(f"{rows}: {1000 * step_s:.1f}" for rows, step_s in curve.seconds.items()),
        f" ({curve.remark})" if curve.remark else "",
    )


def _measure(runner: PipelineRunner, request: GenerationRequest) -> float | None:
    """Seconds of one step of `request` by itself, or None if it cannot be done."""
    stopwatch = Stopwatch(torch.device(runner.model.pipeline.device))
    guidance = runner.model.capabilities.guidance
    steps = guidance.calls_of(request, request.num_inference_steps)
    task = runner.model.factory.tasks[request.task]
    inputs = decode_inputs(request, task.is_fitted, runner.model.capabilities.upscale_factor)
    track = Track(
        id=request.id,
        rows=_rows(runner, request),
        phases=(Phase(steps, request.step_size),),
        images=request.n,
        run=partial(make_images, runner.model, request, inputs, stopwatch.step_ended),
        listener=stopwatch,
    )
    runner.engine.submit(track)
    error = stopwatch.ended.get()
    if error is not None and not is_out_of_memory(error):
        logger.warning("%d images could not be measured: %s", request.n, error)
    return None if error is not None else min(stopwatch.seconds, default=None)


def _rows(runner: PipelineRunner, request: GenerationRequest) -> int:
    return runner.model.capabilities.guidance.rows_of(request)


def _request(runner: PipelineRunner, images: int, steps: int = WARM_UP_STEPS) -> GenerationRequest:
    capabilities = runner.model.capabilities
    request = replace(
        capabilities.usual_request(f"warm-up-{images}"),
        num_inference_steps=capabilities.steps_of(capabilities.default_scheduler).nearest(steps),
        n=images,
    )
    return with_required_inputs(request, runner.model.factory.tasks[request.task])


def _run_first(runner: PipelineRunner) -> None:
    """Make the first image, and see whether it can be shown on the way."""
    request = _request(runner, 1)
    try:
        made = _run(runner, replace(request, previews=1))
    except StepserveError:
        # Images count more: this tells whether there are any.
        _run(runner, request)
        made = 0
        logger.warning("model %s: images cannot be shown on the way", request.model, exc_info=True)
    runner.set_previews(made > 0)


def _run(runner: PipelineRunner, request: GenerationRequest) -> int:
    """Make images; returns how many times they were shown on the way."""
    events: SimpleQueue[Event] = SimpleQueue()
    runner.submit(request, events.put)
    previews = 0
    while not isinstance(end := events.get(), Finished | Failed):
        previews += isinstance(end, Preview)
    if isinstance(end, Finished) or isinstance(end.error, ContentFilteredError):
        # It draws; its checker may withhold what it draws.
        return previews
    if isinstance(end.error, GenerationFailedError):
        # Rather than what a request is answered: that its scheduler or its guidance is to blame.
        check_finite_weights(runner.model.pipeline, math.inf)
    raise end.error
