"""How far an image is from the finest one that a solver makes, by how it was made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheUse
from stepserve.domain.timings import Timings
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.requests.call import call_pipeline
from stepserve.pipelines.requests.hires import calls_of_phases
from stepserve.pipelines.requests.step_caching import step_cache_of
from stepserve.pipelines.serving.runner import PipelineRunner
from torch import Tensor

PATIENCE_S = 3600.0
GUIDANCE_SCALE = 4.0
FIRST_SEED = 100
# They evaluate twice a step, but once at the last.
TWICE = frozenset({"HeunDiscreteScheduler", "KDPM2DiscreteScheduler"})
# Solvers of the same equation without noise, all of which lead to the same fine image.
SOLVERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class Way:
    """A way to make an image: a solver, its steps, and a step cache or none."""

    scheduler: str
    steps: int
    cache: StepCacheUse | None = None

    def __str__(self) -> str:
        name = f"{self.scheduler.removesuffix('Scheduler')} {self.steps}"
        cache = self.cache
        return name if cache is None else f"{name}, {cache.method} {cache.threshold:g}"


@dataclass(frozen=True)
class Quality:
    """What came of a way.

    Args:
        way: how the images were made.
        forwards: of the denoiser, for each image: the mean.
        distance: root of the mean square difference to the fine image, of pixels from 0 to 1: the
            median over prompts.
    """

    way: Way
    forwards: float
    distance: float


@dataclass(frozen=True)
class Drawn:
    """One image without rounding, and the denoiser forwards that it took."""

    pixels: Tensor
    forwards: int


@dataclass
class Waiting:
    """Hears how one request ends, on the engine's thread."""

    name: str
    ended: SimpleQueue[tuple[str, Drawn | BaseException]] = field(repr=False)

    def accepted(self, position: int, expected_s: float) -> None:
        """Nobody waits for it."""

    def started(self) -> None:
        """Nobody waits for it."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The image is there."""
        self.ended.put((self.name, Drawn(result[0], timings.denoiser_calls_run)))

    def failed(self, error: BaseException, timings: Timings) -> None:
        """There is none."""
        self.ended.put((self.name, error))


def measure(
    runner: PipelineRunner, fine: Way, ways: Iterable[Way], prompts: Sequence[str]
) -> list[Quality]:
    """Draw all prompts in all ways, at once, and compare each image with the fine one.

    Args:
        runner: whose model draws, in float32.
        fine: what the others are compared with.
        ways: the others.
        prompts: each with a seed of its own.
    """
    drawn = draw(runner, [fine, *ways], prompts)
    wanted = drawn[fine]
    return [
        Quality(
            way,
            statistics.mean(image.forwards for image in images),
            statistics.median(map(distance, images, wanted)),
        )
        for way, images in drawn.items()
        if way != fine
    ]


def distance(one: Drawn, other: Drawn) -> float:
    """Of two images: the root of the mean square difference."""
    return math.sqrt(float((one.pixels - other.pixels).double().square().mean()))


def draw(
    runner: PipelineRunner, ways: Iterable[Way], prompts: Sequence[str]
) -> dict[Way, list[Drawn]]:
    """One image of each prompt in each way, in the order of the prompts."""
    ways = list(dict.fromkeys(ways))
    ended: SimpleQueue[tuple[str, Drawn | BaseException]] = SimpleQueue()
    names = {(w, p): f"{w}: {p}" for w in ways for p in prompts}
    for (way, prompt), name in names.items():
        request = request_of(runner, way, prompt, FIRST_SEED + prompts.index(prompt), name)
        runner.engine.submit(track_of(runner, request, Waiting(name, ended)))
    found = dict(ended.get(timeout=PATIENCE_S) for _ in names)
    return {way: [_or_raise(found[names[way, prompt]]) for prompt in prompts] for way in ways}


def request_of(
    runner: PipelineRunner, way: Way, prompt: str, seed: int, name: str
) -> GenerationRequest:
    """A request for one image, made that way."""
    limits = runner.model.capabilities
    return GenerationRequest(
        id=name,
        model=limits.id,
        prompt=prompt,
        width=limits.sizes.native,
        height=limits.sizes.native,
        num_inference_steps=way.steps,
        guidance_scale=GUIDANCE_SCALE,
        seed=seed,
        scheduler=way.scheduler,
        step_cache=way.cache,
    )


def track_of(runner: PipelineRunner, request: GenerationRequest, listener: Waiting) -> Track:
    """As the engine is given a request, but for its image, which is not rounded to bytes."""
    model, calls = runner.model, calls_of_phases(runner.model, request)
    guidance = model.capabilities.guidance
    return Track(
        id=request.id,
        rows=guidance.rows_of(request),
        phases=(Phase(guidance.calls_of(request, calls[0]), request.step_size),),
        images=request.n,
        run=partial(call_pipeline, model, request, output_type="pt"),
        listener=listener,
        step_cache=step_cache_of(model, request, calls),
    )


def _or_raise(outcome: Drawn | BaseException) -> Drawn:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def as_many_forwards(schedulers: Iterable[str], forwards: float) -> list[Way]:
    """Ways to spend so many forwards, rounded up, on steps of which none is skipped.

    Args:
        schedulers: solvers by name.
        forwards: of the denoiser.
    """
    whole = math.ceil(forwards)
    return [Way(s, -(-whole // 2) if s in TWICE else whole) for s in schedulers]


def solvers_of(runner: PipelineRunner) -> list[str]:
    """Those that a model offers."""
    offered = runner.model.capabilities.schedulers
    return [scheduler for scheduler in SOLVERS if scheduler in offered]


def rows_of(found: Sequence[Quality]) -> list[str]:
    """A table for people, in Markdown."""
    head = ["| way | forwards | distance |", "|---|---|---|"]
    return head + [f"| {q.way} | {q.forwards:.1f} | {q.distance:.4f} |" for q in found]
