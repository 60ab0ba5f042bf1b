"""On a CUDA device: the images that plain diffusers makes there, with and without graphs.

Skipped where there is no such device.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from plain_step_cache import Decision, skipping
from stepserve.config import SpeedSettings
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheUse
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.modules.wrappers import graphs_of
from stepserve.pipelines.serving.runner import PipelineRunner

from loadtests.engine_bench import mixed_requests, plain_call, raw_pixels, run_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SIZES = ((48, 48), (48, 64), (64, 48), (96, 64), (64, 96), (96, 96), (128, 128))
# Of 255. Forwards that are filled up round otherwise than those of a plain call, and steps make
# more of it: single pixels were seen to differ by 46.
MOST_MEAN_LEVELS = 1.0
# Shapes are recorded when they come the second time, and requests meet at random.
ROUNDS = 3

Pixels = NDArray[np.int16]


@pytest.fixture(params=[False, True], ids=["eager", "graphs"], scope="module")
def runner(request: pytest.FixtureRequest) -> Iterator[PipelineRunner]:
    speed = SpeedSettings(cuda_graphs=request.param)
    runner = PipelineRunner(load_model("emoji", EMBEDDED, device="cuda", speed=speed))
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_model("emoji", EMBEDDED, device="cuda").pipeline


def a_request(index: int, **changes: Any) -> GenerationRequest:
    """Short, and unlike the others."""
    usual = replace(mixed_requests()[1], num_inference_steps=5 + index % 4)
    return replace(usual, id=f"request-{index}", seed=500 + 10 * index, **changes)


def set_scheduler(pipeline: Any, request: GenerationRequest) -> None:
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)


def plain_images(pipeline: Any, request: GenerationRequest) -> list[Pixels]:
    """What diffusers makes of it, alone."""
    set_scheduler(pipeline, request)
    return images_of(pipeline, request)


def images_of(pipeline: Any, request: GenerationRequest) -> list[Pixels]:
    seeds = range(request.seed, request.seed + request.n)
    with torch.no_grad():
        images = pipeline(
            [request.prompt] * request.n,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    return [np.asarray(image).astype(np.int16) for image in images]


def pixels_of(finished: Finished) -> list[Pixels]:
    return [
        np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(np.int16)
        for image in finished.images
    ]


def largest_difference(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> int:
    return max(int(abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def mean_difference(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> float:
    return max(float(abs(a - b).mean()) for a, b in zip(ours, theirs, strict=True))


def serve_together(
    runner: PipelineRunner, requests: Sequence[GenerationRequest]
) -> list[list[Pixels]]:
    for _ in range(ROUNDS):
        _, finished = run_engine(runner, list(requests))
    assert runner.engine.counters.retries == 0
    return [pixels_of(answer) for answer in finished]


def serve_each_alone(
    runner: PipelineRunner, requests: Sequence[GenerationRequest]
) -> list[list[Pixels]]:
    return [pixels_of(run_engine(runner, [request])[1][0]) for request in requests]


def test_images_are_those_of_plain_diffusers(runner: PipelineRunner, plain: Any) -> None:
    assert runner.prepared.plan.same_bytes
    requests = mixed_requests()
    for _ in range(ROUNDS):
        _, finished = run_engine(runner, requests)
    assert runner.engine.counters.retries == 0
    assert runner.engine.counters.calls > 2 * runner.engine.counters.forwards
    with torch.no_grad():
        wanted = [plain_call(plain, request) for request in requests]
    assert [raw_pixels(answer) for answer in finished] == wanted
    recorded = sum(graph.recorded for graph in graphs_of(runner.model.pipeline))
    assert (recorded > 0) == runner.model.cuda_graphs


def test_so_they_are_with_every_scheduler(runner: PipelineRunner, plain: Any) -> None:
    names = runner.capabilities().schedulers
    assert len(names) > 10
    scales = (4.0, 1.0, 6.0)
    requests = [
        a_request(index, scheduler=name, guidance_scale=scales[index % 3])
        for index, name in enumerate(names)
    ]
    made = serve_together(runner, requests)
    differences = {
        request.scheduler: largest_difference(ours, plain_images(plain, request))
        for request, ours in zip(requests, made, strict=True)
    }
    assert differences == dict.fromkeys(names, 0)


def test_so_they_are_for_several_images_of_a_request(runner: PipelineRunner, plain: Any) -> None:
    requests = [a_request(index, n=n) for index, n in enumerate((1, 2, 3, 4, 2, 4))]
    made = serve_together(runner, requests)
    differences = [
        largest_difference(ours, plain_images(plain, request))
        for request, ours in zip(requests, made, strict=True)
    ]
    assert differences == [0] * len(requests)


def test_images_of_every_size_are_the_same_when_co_batched(
    runner: PipelineRunner, plain: Any
) -> None:
    requests = [
        a_request(index, width=width, height=height, guidance_scale=(4.0, 1.0)[index // 7])
        for index, (width, height) in enumerate(SIZES * 2)
    ]
    together, alone = serve_together(runner, requests), serve_each_alone(runner, requests)
    assert runner.capabilities().same_bytes
    sizes = [f"{r.width}x{r.height}, guidance {r.guidance_scale:g}" for r in requests]
    differences = map(largest_difference, together, alone)
    assert dict(zip(sizes, differences, strict=True)) == dict.fromkeys(sizes, 0)
    from_plain = {
        size: mean_difference(ours, plain_images(plain, request))
        for size, ours, request in zip(sizes, together, requests, strict=True)
    }
    assert max(from_plain.values()) <= MOST_MEAN_LEVELS, from_plain


def test_images_are_decoded_beside_the_steps_of_others(runner: PipelineRunner) -> None:
    assert runner.engine.batcher.execution.side_stream is not None
    long = a_request(0, num_inference_steps=60)
    short = [a_request(index, num_inference_steps=4) for index in range(1, 5)]
    wanted = serve_each_alone(runner, [long, *short])
    made = serve_together(runner, [long, *short])
    assert [largest_difference(*pair) for pair in zip(made, wanted, strict=True)] == [0] * 5


def test_steps_are_skipped_by_the_same_rule_at_any_load(runner: PipelineRunner, plain: Any) -> None:
    thresholds = (0.1, 0.2, 0.3, 0.2)
    requests = [
        a_request(index, num_inference_steps=20 + index, step_cache=StepCacheUse(threshold=value))
        for index, value in enumerate(thresholds)
    ]
    alone = [run_engine(runner, [request])[1][0] for request in requests]
    together = serve_together(runner, requests)
    for request, made, again in zip(requests, alone, together, strict=True):
        set_scheduler(plain, request)
        assert request.step_cache is not None
        steps, decision = request.num_inference_steps, Decision(request.step_cache.threshold)
        with skipping(plain.scheduler, {"unet": plain.unet}, steps, decision) as cache:
            wanted = images_of(plain, request)
        assert made.timings.denoiser_calls_run == sum(cache.ran) < steps
        assert largest_difference(again, pixels_of(made)) == 0
        assert largest_difference(pixels_of(made), wanted) == 0
