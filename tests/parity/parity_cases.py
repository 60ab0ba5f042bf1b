"""Requests of every kind, a plain pipeline to compare with, and a way to serve them staggered."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.timings import Timings
from stepserve.engine.tracks.track import Phase, Stage, Track
from stepserve.pipelines.loading.folders import DTYPES
from stepserve.pipelines.serving.runner import PipelineRunner

PATIENCE_S = 240.0
PROMPTS = ("red heart", "rocket on a blue background", "smiling cat face", "green leaf, noto")
NEGATIVE_PROMPTS = ("", "blue", "blurry, dark")
GUIDANCE = (4.0, 1.0, 7.5, 0.0)
# Most requests share a shape; the others come in pairs at least, so that they can share too.
SIZES = ((64, 64), (64, 64), (48, 48), (64, 64), (96, 64), (64, 64), (64, 128), (64, 64))
LARGE = (128, 128)
IMAGES = (1, 1, 2, 1, 3)
STEPS = (5, 4, 7, 6)


def mixed_requests(schedulers: Sequence[str], each: int = 2) -> list[GenerationRequest]:
    """`each` requests for every scheduler, which differ in everything a request can say."""
    requests = []
    for index in range(each * len(schedulers)):
        # Two of the largest are enough: they take as long as eight others.
        width, height = LARGE if index in (7, 15) else SIZES[index % len(SIZES)]
        guidance_scale = GUIDANCE[index // 2 % len(GUIDANCE)]
        negative_prompt = NEGATIVE_PROMPTS[index % len(NEGATIVE_PROMPTS)]
        requests.append(
            GenerationRequest(
                id=f"request-{index}",
                model="emoji",
                prompt=PROMPTS[index % len(PROMPTS)],
                negative_prompt=negative_prompt if guidance_scale > 1 else "",
                width=width,
                height=height,
                num_inference_steps=STEPS[index % len(STEPS)],
                guidance_scale=guidance_scale,
                seed=1000 + 10 * index,
                scheduler=schedulers[index % len(schedulers)],
                n=IMAGES[index % len(IMAGES)],
            )
        )
    return requests


def load_reference(folder: Path, dtype: str) -> Any:
    """A plain pipeline that Stepserve has never touched."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    # The same memory layout, which decides which kernels run.
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def call_plain(pipeline: Any, request: GenerationRequest, output_type: str = "pil") -> Any:
    """One direct pipeline call, alone."""
    pipeline = copy.copy(pipeline)
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return call(pipeline, request, output_type)


def call(pipeline: Any, request: GenerationRequest, output_type: str, **extra: Any) -> Any:
    seeds = range(request.seed, request.seed + request.n)
    return pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.n,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output_type,
        **extra,
    ).images


class Answer:
    """Keeps the end of one request, and tells when it is under way."""

    def __init__(self, under_way: threading.Event) -> None:
        self.under_way, self.done = under_way, threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def stepped(self, step: int) -> None:
        if step == 2:
            self.under_way.set()

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self.under_way.set()
        self.done.set()

    # The engine's listener:

    def accepted(self, position: int, backlog_s: float) -> None:
        pass

    def started(self) -> None:
        pass

    def finished(self, result: Any, timings: Timings) -> None:
        self.end(result)

    def failed(self, error: BaseException, timings: Timings) -> None:
        self.end(error=error)

    # The runner's sink:

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            self.stepped(event.step)
        elif isinstance(event, Finished):
            self.end(event)
        elif isinstance(event, Failed):
            self.end(error=event.error)


Submit = Callable[[PipelineRunner, GenerationRequest, Answer], None]


def serve_staggered(
    runner: PipelineRunner, requests: Sequence[GenerationRequest], submit: Submit, waves: int = 4
) -> list[Any]:
    """Serve in waves, each submitted when one of the wave before has done two steps."""
    answers: dict[str, Answer] = {}
    for wave in range(waves):
        under_way = threading.Event()
        for request in requests[wave::waves]:
            answers[request.id] = Answer(under_way)
            submit(runner, request, answers[request.id])
        assert under_way.wait(PATIENCE_S)
    for request_id, answer in answers.items():
        assert answer.done.wait(PATIENCE_S), request_id
        assert answer.error is None, f"{request_id}: {answer.error}"
    return [answers[request.id].result for request in requests]


def submit_for_files(runner: PipelineRunner, request: GenerationRequest, answer: Answer) -> None:
    """The whole way: the answer is a Finished event with image files."""
    runner.submit(request, answer)


def submit_for_tensors(runner: PipelineRunner, request: GenerationRequest, answer: Answer) -> None:
    """Through the engine alone: the answer is images before they are rounded to bytes."""

    def step_ended(pipeline: Any, index: int, timestep: Any, values: Any) -> dict[str, Any]:
        answer.stepped(index + 1)
        return {}

    def run() -> torch.Tensor:
        pipeline = runner.model.factory.copy(request.scheduler)
        return call(pipeline, request, "pt", callback_on_step_end=step_ended)

    steps = request.num_inference_steps
    rows = runner.model.capabilities.guidance.rows_of(request)
    runner.engine.submit(Track(request.id, rows, (Phase(steps),), request.n, run, answer))


class Forwards:
    """The forwards of the denoiser, as the ids of the requests that had rows in them."""

    def __init__(self) -> None:
        self.ids: list[tuple[str, ...]] = []

    def forward_ended(self, report: ForwardReport) -> None:
        if report.stage == Stage.DENOISE:
            self.ids.append(tuple(key.id for key, _ in report.requests))

    def request_ended(self, report: EndReport) -> None:
        pass

    @property
    def were_shared(self) -> bool:
        """Whether requests met in one of them."""
        return any(len(set(ids)) > 1 for ids in self.ids)


class ForwardCounter:
    """Counts the rows of every forward that the denoiser really runs, shared or not."""

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        # Of a part of the UNet: the UNet itself is called once by each request.
        self._handle = unet.conv_in.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.rows.append(args[0].shape[0])

    def remove(self) -> None:
        self._handle.remove()

    @property
    def mean_rows(self) -> float:
        return sum(self.rows) / len(self.rows)


def largest_byte_difference(one: Image.Image, other: Image.Image) -> int:
    left, right = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other))
    return int(np.abs(left - right).max())


Forward = Callable[[torch.Tensor], torch.Tensor]


def rows_are_independent(forward: Forward, inputs: torch.Tensor) -> bool:
    """Whether each row has the same bits alone, in pairs, and among all."""
    with torch.no_grad():
        together = forward(inputs)
        for size in (1, 2, 3):
            apart = torch.cat([forward(part) for part in inputs.split(size)])
            if not torch.equal(apart, together):
                return False
    return True
