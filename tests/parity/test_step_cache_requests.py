"""Requests with step caches as they are served: of every task, in two phases, with adapters.

Each gets what a plain call with the same rule around it gives, and the same bytes at any load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from parity_cases import PATIENCE_S, load_reference
from PIL import Image
from plain_step_cache import Decision, skipping
from same_bytes_cases import CoBatchWatch, RandomLoad, digest
from stepserve.domain.events import Event, Failed, Finished, Preview
from stepserve.domain.requests import AdapterUse, GenerationRequest, Hires
from stepserve.domain.step_cache import StepCacheUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.serving.runner import PipelineRunner
from task_cases import differences, expected_calls, plain_arguments, plain_pipeline, request_for

Say = Callable[[str], None]
BFLOAT16_BYTE_BOUND = 64
LOADED = 16
LEAST_MEAN_ROWS = 2.0
STEPS = 12


def a_request(
    name: str,
    threshold: float,
    task: Task = Task.TEXT_TO_IMAGE,
    scheduler: str = "DDIMScheduler",
    **changes: Any,
) -> GenerationRequest:
    usual = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "width": 64, "height": 64, "n": 1}
    cache = StepCacheUse(threshold=threshold)
    request = request_for(task, 3, scheduler, **usual, step_cache=cache)
    return replace(request, id=name, **changes)


REQUESTS = (
    a_request("drawn", 0.4, seed=1),
    a_request("two images, with previews", 0.3, n=2, previews=4, num_inference_steps=14),
    a_request("without guidance", 0.4, guidance_scale=1.0, negative_prompt=""),
    a_request(
        "guidance in an interval",
        0.5,
        guidance_start=0.3,
        guidance_end=0.7,
        num_inference_steps=24,
        seed=2,
    ),
    a_request("two calls a step", 0.4, scheduler="HeunDiscreteScheduler", num_inference_steps=8),
    a_request("another size", 0.5, scheduler="DPMSolverMultistepScheduler", width=96),
    a_request("varied", 0.4, Task.IMAGE_TO_IMAGE, strength=0.8, num_inference_steps=15),
    a_request("repainted", 0.4, Task.INPAINTING, strength=0.9, num_inference_steps=14),
    a_request("refined", 0.5, hires=Hires(1.5, 0.8, 14, 96, 96), num_inference_steps=10),
    a_request("adapted", 0.4, adapters=(AdapterUse("first", 0.8),)),
)


@pytest.fixture(scope="module")
def alone(served: PipelineRunner) -> dict[str, Finished]:
    """What each request gets by itself."""
    return {request.id: serve_alone(served, request) for request in REQUESTS}


def serve_alone(runner: PipelineRunner, request: GenerationRequest) -> Finished:
    events: SimpleQueue[Event] = SimpleQueue()
    runner.submit(request, events.put)
    previews = 0
    while not isinstance(event := events.get(timeout=PATIENCE_S), Finished):
        assert not isinstance(event, Failed), f"{request.id}: {event.error}"
        previews += isinstance(event, Preview)
    assert previews == request.previews
    return event


@dataclass
class PlainImages:
    """What plain diffusers makes of a request, with the rule around its modules.

    Args:
        images: in their order.
        ran: of every phase, which evaluations ran.
    """

    images: Sequence[Image.Image]
    ran: list[list[bool]]

    @property
    def calls_run(self) -> int:
        """Of the denoiser."""
        return sum(map(sum, self.ran))


def call_plainly(reference: Any, request: GenerationRequest) -> PlainImages:
    assert request.step_cache is not None
    decision = Decision(request.step_cache.threshold)
    made = PlainImages([], [])
    generators = plain_arguments(request)["generator"]
    for part in request.phases:
        pipeline, calls = plain_pipeline(reference, part), expected_calls(part)
        arguments = plain_arguments(part) | {"generator": generators}
        if made.images:
            size = part.width, part.height
            resized = [image.resize(size, Image.Resampling.LANCZOS) for image in made.images]
            arguments["image"] = resized
        with ExitStack() as undo:
            cache = undo.enter_context(
                skipping(pipeline.scheduler, {"unet": pipeline.unet}, calls, decision)
            )
            if part.guidance_start > 0 or part.guidance_end < 1:
                undo.enter_context(narrowed(pipeline.unet, partial(part.is_guided, calls=calls)))
            made.images = pipeline(**arguments).images
        assert len(cache.ran) == calls
        made.ran.append(cache.ran)
    return made


@contextmanager
def narrowed(unet: Any, is_guided: Callable[[int], bool]) -> Iterator[None]:
    """Without guidance the conditional rows run alone, and their output counts for both halves."""
    forward, calls = unet.forward, itertools.count()

    def narrow(sample: Any, timestep: Any, **kwargs: Any) -> Any:
        if is_guided(next(calls)):
            return forward(sample, timestep, **kwargs)
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].chunk(2)[1]
        (noise,) = forward(sample.chunk(2)[1], timestep, **kwargs)
        return (torch.cat([noise, noise]),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "forward", narrow)
        yield


def plain_reference(model_folder: Path, adapters: Path, request: GenerationRequest) -> Any:
    """The plain pipeline, with the adapters of a request."""
    pipeline = load_reference(model_folder, "bfloat16")
    for use in request.adapters:
        pipeline.load_lora_weights(adapters / f"{use.name}.safetensors", adapter_name=use.name)
    if request.adapters:
        names = [use.name for use in request.adapters]
        pipeline.set_adapters(names, [use.scale for use in request.adapters])
    return pipeline


@pytest.mark.parametrize("request_", REQUESTS, ids=[request.id for request in REQUESTS])
def test_a_request_gets_what_the_rule_gives_around_plain_diffusers(
    request_: GenerationRequest,
    alone: dict[str, Finished],
    model_folder: Path,
    adapters: Path,
    batch_invariant: bool,
) -> None:
    plain = call_plainly(plain_reference(model_folder, adapters, request_), request_)
    assert all(any(phase[3:-1]) and not all(phase[3:-1]) for phase in plain.ran), plain.ran
    finished = alone[request_.id]
    assert finished.timings.denoiser_calls == sum(map(len, plain.ran))
    assert finished.timings.denoiser_calls_run == plain.calls_run
    last = replace(request_.phases[-1], id=request_.id)
    found = differences([last], [finished], [list(plain.images)])
    assert max(found.values(), default=0) <= (0 if batch_invariant else BFLOAT16_BYTE_BOUND), found


def test_bytes_are_those_of_the_request_alone_among_others(
    served: PipelineRunner, alone: dict[str, Finished], say: Say
) -> None:
    """With other thresholds, and without a step cache."""
    whole = [replace(request, step_cache=None, id=f"whole, {request.id}") for request in REQUESTS]
    pool = [*REQUESTS, *whole[::3]]
    wanted = {name: digest(finished) for name, finished in alone.items()}
    wanted |= {request.id: digest(serve_alone(served, request)) for request in whole[::3]}
    only_reproducible = not served.prepared.plan.same_bytes
    load = RandomLoad(
        served, pool, seed=1, enough=LOADED, reproducible=1.0 if only_reproducible else 0.05
    )
    watch = CoBatchWatch(served.model.pipeline.unet)
    try:
        load.serve()
    finally:
        watch.remove()
    say(f"{watch.mean_rows:.1f} rows a forward, {load.cancelled} cancelled")
    assert load.wrong(wanted) == []
    assert served.engine.counters.retries == 0
    assert only_reproducible or watch.mean_rows > LEAST_MEAN_ROWS
    assert len(set(wanted.values())) == len(wanted)
