"""The engine against plain diffusers: same model, dtype, threads and process, in turns.

    python -m loadtests.engine_bench [--repeats 5] [--out out/bench-engine.json]

Sixteen concurrent requests that agree on nothing (4 to 50 steps, eight schedulers, guidance on and
off) go through the engine at once; plain diffusers makes the same images one after another. Every
image is compared byte for byte. Medians are reported; absolute times mean nothing elsewhere.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import diffusers
import torch
from PIL import Image
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up

STEPS = (4, 6, 8, 10, 12, 15, 18, 20, 20, 25, 28, 30, 35, 40, 45, 50)
SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
)
PROMPTS = ("red heart", "pizza", "rocket on a blue background", "cat face, fluent style")
ARRIVALS = 60


@dataclass(frozen=True)
class Comparison:
    """Seconds for all requests, by repeat."""

    plain_s: tuple[float, ...]
    engine_s: tuple[float, ...]
    identical: int
    images: int
    outside_share: float
    rows_per_forward: float

    @property
    def speedup(self) -> float:
        """Ratio of medians."""
        return statistics.median(self.plain_s) / statistics.median(self.engine_s)


def mixed_requests(size: int = 64) -> list[GenerationRequest]:
    """Sixteen requests that differ in everything but the size."""
    return [
        GenerationRequest(
            id=f"mixed-{index}",
            model="emoji",
            prompt=PROMPTS[index % len(PROMPTS)],
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=1.0 if index % 4 == 3 else 3.0 + index % 3,
            seed=100 + index,
            scheduler=SCHEDULERS[index % len(SCHEDULERS)],
        )
        for index, steps in enumerate(STEPS)
    ]


def plain_call(pipeline: Any, request: GenerationRequest) -> bytes:
    """The reference: diffusers alone, called as its documentation shows. Returns raw pixels."""
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    image = pipeline(
        request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(request.seed)],
    ).images[0]
    pixels: bytes = image.tobytes()
    return pixels


def run_plain(pipeline: Any, requests: list[GenerationRequest]) -> tuple[float, list[bytes]]:
    """All requests one after another."""
    started_s = time.perf_counter()
    pixels = [plain_call(pipeline, request) for request in requests]
    return time.perf_counter() - started_s, pixels


def run_engine(
    runner: PipelineRunner, requests: list[GenerationRequest]
) -> tuple[float, list[Finished]]:
    """All requests at once; returns when the last image is encoded."""
    ended: SimpleQueue[Finished | Failed] = SimpleQueue()
    sink = endings_into(ended)
    started_s = time.perf_counter()
    for request in requests:
        runner.submit(request, sink)
    outcomes = [ended.get() for _ in requests]
    seconds = time.perf_counter() - started_s
    finished = {outcome.request_id: or_raise(outcome) for outcome in outcomes}
    return seconds, [finished[request.id] for request in requests]


def endings_into(ended: SimpleQueue[Finished | Failed]) -> Callable[[Event], None]:
    """A sink that keeps how requests end."""

    def sink(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended.put(event)

    return sink


def over_neighbours(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Each value over the mean of what was measured right before and right after it.

    The speed of a machine drifts by more than what is looked for.
    """
    around = pairwise(references)
    return [2 * value / sum(both) for value, both in zip(values, around, strict=True)]


def or_raise(outcome: Finished | Failed) -> Finished:
    """A benchmark has no use for failures."""
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome


def compare(
    runner: PipelineRunner, pipeline: Any, requests: list[GenerationRequest], repeats: int
) -> Comparison:
    """Plain and engine in turns, warm, `repeats` times.

    Both on the engine thread: with a second one that runs torch there would be two OpenMP teams
    for the same cores, which slows both.
    """
    plain = partial(run_plain, pipeline, requests)
    runner.engine.call(plain)
    run_engine(runner, requests)
    plain_s, engine_s = [], []
    before = replace(runner.engine.counters)
    for repeat in range(repeats):
        seconds, pixels = runner.engine.call(plain)
        plain_s.append(seconds)
        seconds, finished = run_engine(runner, requests)
        engine_s.append(seconds)
        print(f"  repeat {repeat + 1}: plain {plain_s[-1]:.2f} s, engine {engine_s[-1]:.2f} s")
    after = runner.engine.counters
    busy_s, forward_s = after.busy_s - before.busy_s, after.forward_s - before.forward_s
    return Comparison(
        tuple(plain_s),
        tuple(engine_s),
        identical=sum(raw_pixels(f) == p for f, p in zip(finished, pixels, strict=True)),
        images=len(requests),
        outside_share=1 - forward_s / busy_s,
        rows_per_forward=(after.rows - before.rows) / (after.forwards - before.forwards),
    )


def raw_pixels(finished: Finished) -> bytes:
    """Pixels of the first image of an answer."""
    return Image.open(io.BytesIO(finished.images[0].data)).convert("RGB").tobytes()


def admission_latency(runner: PipelineRunner, seed: int = 0) -> tuple[float, float]:
    """Newcomers to a running batch with free rows: seconds until their first step begins.

    Returns:
        (p95 seconds from arrival to the start of the first step, median seconds of a step then).
    """
    chance = random.Random(seed)
    stop = threading.Event()
    background = keep_busy(runner, stop)
    time.sleep(0.5)
    waits, steps_s = [], []
    for index in range(ARRIVALS):
        time.sleep(chance.uniform(0.05, 0.25))
        # A prompt never seen before: else its embedding would be remembered.
        newcomer = replace(
            mixed_requests()[0],
            id=f"newcomer-{index}",
            prompt=f"red heart {index}",
            num_inference_steps=4,
        )
        _, (finished,) = run_engine(runner, [newcomer])
        waits.append(finished.timings.first_step_s)
        steps_s.append(finished.timings.denoise_s / newcomer.num_inference_steps)
    stop.set()
    background.join()
    return statistics.quantiles(waits, n=20)[-1], statistics.median(steps_s)


def keep_busy(runner: PipelineRunner, stop: threading.Event) -> threading.Thread:
    """Four long requests at a time, so that 8 of 32 rows are taken."""
    long = replace(mixed_requests()[1], num_inference_steps=100, guidance_scale=4.0)

    def work() -> None:
        turn = 0
        while not stop.is_set():
            run_engine(runner, [replace(long, id=f"long-{turn}-{i}", seed=i) for i in range(4)])
            turn += 1

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def denoiser_step_s(
    model: LoadedModel,
    rows: int,
    repeats: int = 20,
    average: Callable[[Iterable[float]], float] = statistics.median,
) -> float:
    """Seconds of one bare denoiser forward."""
    unet = model.pipeline.unet
    config = unet.config
    sample = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(rows, 32, config.cross_attention_dim).to(unet.dtype)
    call: Callable[[], Any] = lambda: unet(sample.to(unet.dtype), torch.tensor(500), text)  # noqa: E731
    with torch.no_grad():
        call()
        return average([_timed(call) for _ in range(repeats)])


def _timed(call: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("out/bench-engine.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = load_model("emoji", options.model)
    runner = PipelineRunner(
        load_model("emoji", options.model), EngineOptions(threads=options.threads)
    )
    runner.start()
    warm_up(runner)
    step = partial(denoiser_step_s, plain)
    curve = {rows: runner.engine.call(partial(step, rows)) for rows in (1, 2, 4, 8, 16, 32)}
    comparison = compare(runner, plain.pipeline, mixed_requests(), options.repeats)
    first_step_s, step_s = admission_latency(runner)
    runner.stop()
    report = {
        **asdict(comparison),
        "speedup": comparison.speedup,
        "row_curve_ms_per_row": {r: 1000 * s / r for r, s in curve.items()},
        "first_step_p95_s": first_step_s,
        "step_s": step_s,
        "first_step_p95_in_steps": first_step_s / step_s,
        "threads": options.threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))
    print_table(comparison, report)


def print_table(comparison: Comparison, report: dict[str, Any]) -> None:
    """Goals beside what was measured."""
    rows = (
        ("throughput over plain diffusers", f"{comparison.speedup:.2f}x", ">= 2.2x"),
        ("images byte-identical", f"{comparison.identical}/{comparison.images}", "all"),
        ("time outside forwards", f"{comparison.outside_share:.1%}", "<= 5 %"),
        ("p95 arrival to first step", f"{report['first_step_p95_in_steps']:.2f} steps", "<= 1.2"),
        ("rows per forward", f"{comparison.rows_per_forward:.1f}", ""),
    )
    for name, value, goal in rows:
        print(f"{name:36}{value:>14}   {goal}")


if __name__ == "__main__":
    main()
