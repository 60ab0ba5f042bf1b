"""First forwards are slow, as kernels are chosen for each shape: better before serving."""

from __future__ import annotations

import gc
import time
from queue import SimpleQueue

from service.domain.errors import StepserveError
from service.domain.events import Event, Failed, Finished
from service.domain.requests import GenerationRequest
from service.pipelines.runner import PipelineRunner

WARM_UP_STEPS = 2


def warm_up(runner: PipelineRunner) -> float:
    """Run small requests of growing row counts through the engine; returns seconds taken.

    Raises:
        StepserveError: the model cannot make a picture.
    """
    started_s = time.perf_counter()
    pictures = 1
    limit = min(runner.model.capabilities.max_n, runner.engine.options.row_ceiling // 2)
    while pictures <= max(limit, 1):
        _run(runner, _request(runner, pictures))
        pictures *= 2
    # What is loaded by now stays: the garbage collector need not walk a million objects again and
    # again between two denoising steps.
    gc.collect()
    gc.freeze()
    return time.perf_counter() - started_s


def _request(runner: PipelineRunner, pictures: int) -> GenerationRequest:
    capabilities = runner.model.capabilities
    return GenerationRequest(
        id=f"warm-up-{pictures}",
        model=capabilities.id,
        prompt="warm up",
        width=capabilities.sizes.native,
        height=capabilities.sizes.native,
        num_inference_steps=WARM_UP_STEPS,
        guidance_scale=capabilities.default_guidance_scale,
        seed=0,
        scheduler=capabilities.default_scheduler,
        n=pictures,
    )


def _run(runner: PipelineRunner, request: GenerationRequest) -> None:
    outcome: SimpleQueue[Finished | StepserveError] = SimpleQueue()

    def sink(event: Event) -> None:
        if isinstance(event, Finished):
            outcome.put(event)
        elif isinstance(event, Failed):
            outcome.put(event.error)

    runner.submit(request, sink)
    result = outcome.get()
    if isinstance(result, StepserveError):
        raise result
