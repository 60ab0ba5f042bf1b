"""How near the engine comes to the bare denoiser, and what else sharing costs and brings.

    python -m loadtests.limit_bench [--repeats 5] [--out out/bench-limit.json] [--plot FILE]

Everything runs on the engine's thread, the bare denoiser and plain diffusers too: one OpenMP team,
the same dtype and threads for all, in turns. Medians are reported, of the ratios where two are
compared. Where runs are long, forwards of the bare denoiser in between tell how fast the machine
is.

- near the limit: rows per second at saturation beside those of the denoiser called in a loop;
- the curve of that over 1 to 64 concurrent requests;
- one homogeneous batch of eight beside diffusers' own `pipe([prompt] * 8)`;
- guidance at 60 % of the steps beside guidance at all of them;
- how well the end of each request was predicted when it was accepted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from stepserve.domain.events import Accepted, Event, Failed, Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up

from loadtests.engine_bench import (
    endings_into,
    mixed_requests,
    or_raise,
    over_neighbours,
    run_engine,
)

CONCURRENT = (1, 2, 4, 8, 16, 32, 64)
ROW_COUNTS = (2, 8, 16, 32, 48, 64)
STEPS = 20
BATCH = 8
INTERVAL = 0.6
INTERVAL_REQUESTS = 96
AT_ONCE = 32
BETWEEN_S = 0.4
PREDICTED_LOAD = 0.8
PREDICTED_REQUESTS = 96
PREDICTED_SEEDS = (1, 2, 3, 4)


def requests_alike(count: int, **changes: Any) -> list[GenerationRequest]:
    """That many requests of 20 steps that differ in the seed only."""
    alike = replace(mixed_requests()[1], num_inference_steps=STEPS, guidance_scale=4.0, **changes)
    return [replace(alike, id=f"alike-{index}", seed=index) for index in range(count)]


def bare_rows_per_s(runner: PipelineRunner, rows: int, forwards: int = 12) -> float:
    """The resident denoiser alone, called in a loop on the engine's thread."""
    unet = runner.model.pipeline.unet
    config, tokens = unet.config, runner.model.pipeline.tokenizer.model_max_length
    sample = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(rows, tokens, config.cross_attention_dim).to(unet.dtype)
    timesteps = torch.full((rows,), 500)

    def loop() -> float:
        latents = sample.to(unet.dtype)
        unet(latents, timesteps, text, return_dict=False)
        started_s = time.perf_counter()
        for _ in range(forwards):
            unet(latents, timesteps, text, return_dict=False)
        return rows * forwards / (time.perf_counter() - started_s)

    return runner.engine.call(loop)


def bare_by_rows(runner: PipelineRunner, repeats: int) -> dict[int, float]:
    """Rows per second of the bare denoiser by rows of a forward, in turns."""
    rates: dict[int, list[float]] = {rows: [] for rows in ROW_COUNTS}
    for _ in range(repeats):
        for rows, seen in rates.items():
            seen.append(bare_rows_per_s(runner, rows, forwards=4))
    return {rows: statistics.median(seen) for rows, seen in rates.items()}


def engine_rows_per_s(runner: PipelineRunner, count: int) -> float:
    """Denoiser rows of that many concurrent requests, by the time until the last has its file."""
    requests = requests_alike(count)
    seconds, _ = run_engine(runner, requests)
    return (
        sum(runner.model.capabilities.guidance.rows_of(request) for request in requests)
        * STEPS
        / seconds
    )


def median_over(
    measure: Callable[[], float], reference: Callable[[], float], repeats: int
) -> float:
    """What one gives over what the other gives right before and right after it."""
    values, references = [], [reference()]
    for _ in range(repeats):
        values.append(measure())
        references.append(reference())
    return statistics.median(over_neighbours(values, references))


def saturated_over_bare(runner: PipelineRunner, rows: int, count: int = 96) -> float:
    """Denoiser rows by the engine's time, but for what text encoder and VAE took of it, over bare.

    The bare denoiser is called between ticks, of which the engine's time does not consist: a
    machine whose speed drifts is equally fast for both.
    """
    counters = runner.engine.counters
    before = replace(counters)
    ended: SimpleQueue[Finished | Failed] = SimpleQueue()
    sink = endings_into(ended)
    for request in requests_alike(count):
        runner.submit(request, sink)
    bare: list[float] = []
    while count:
        bare.append(bare_rows_per_s(runner, rows, forwards=2))
        time.sleep(BETWEEN_S)
        while not ended.empty():
            or_raise(ended.get())
            count -= 1
    denoised = counters.denoiser_rows - before.denoiser_rows
    others_s = counters.forward_s - before.forward_s - (counters.denoiser_s - before.denoiser_s)
    engine_s = counters.busy_s - before.busy_s - others_s
    return denoised / engine_s / statistics.harmonic_mean(bare)


def batch_of_eight_ratio(runner: PipelineRunner, repeats: int) -> float:
    """Eight requests through the engine over diffusers' own batch before and after them."""
    request = requests_alike(BATCH)[0]
    pipeline = runner.model.factory.copy(request.scheduler)

    def plain() -> float:
        started_s = time.perf_counter()
        pipeline(
            [request.prompt] * BATCH,
            num_inference_steps=STEPS,
            guidance_scale=request.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(BATCH)],
        )
        return time.perf_counter() - started_s

    def ours() -> float:
        seconds, _ = run_engine(runner, requests_alike(BATCH))
        return seconds

    return median_over(ours, partial(runner.engine.call, plain), repeats)


def images_per_bare_row(runner: PipelineRunner, rows: int, guidance_end: float) -> float:
    """With always as many requests at once, of guidance up to that share of their steps.

    Images by the engine's time over rows by the bare denoiser's, which is called between ticks.
    From when the first of them have ended: at the end of a run there is less and less to share.
    """
    ended: SimpleQueue[Finished | Failed] = SimpleQueue()
    sink = endings_into(ended)
    requests = requests_alike(INTERVAL_REQUESTS + AT_ONCE, guidance_end=guidance_end)
    for request in requests[:AT_ONCE]:
        runner.submit(request, sink)
    ended_s, bare = [], []
    for number, request in enumerate(requests[AT_ONCE:]):
        or_raise(ended.get())
        ended_s.append(runner.engine.counters.busy_s)
        runner.submit(request, sink)
        if number % 4 == 0:
            bare.append(bare_rows_per_s(runner, rows, forwards=2))
    for _ in range(AT_ONCE):
        or_raise(ended.get())
    images_per_s = (INTERVAL_REQUESTS - AT_ONCE) / (ended_s[-1] - ended_s[AT_ONCE - 1])
    return images_per_s / statistics.harmonic_mean(bare)


def prediction_errors(runner: PipelineRunner, seed: int = 0) -> list[float]:
    """Relative errors of the finish times predicted at acceptance, on a steady mixed load.

    Requests come at random, at 0.8 of what the engine can do.
    """
    errors: dict[str, float] = {}
    ended: SimpleQueue[Finished | Failed] = SimpleQueue()
    expected_s: dict[str, float | None] = {}

    def sink(event: Event) -> None:
        if isinstance(event, Accepted):
            expected_s[event.request_id] = event.expected_s
        elif isinstance(event, Finished | Failed):
            ended.put(event)

    whole_s, _ = run_engine(runner, mixed_requests())
    gap_s = whole_s / len(mixed_requests()) / PREDICTED_LOAD
    chance = random.Random(seed)
    drawn = chance.choices(mixed_requests(), k=PREDICTED_REQUESTS)
    requests = [replace(request, id=f"predicted-{i}") for i, request in enumerate(drawn)]
    for request in requests:
        runner.submit(request, sink)
        time.sleep(chance.expovariate(1 / gap_s))
    for _ in requests:
        finished = or_raise(ended.get())
        predicted = expected_s[finished.request_id]
        assert predicted is not None
        errors[finished.request_id] = abs(predicted / finished.timings.total_s - 1)
    # Those of the first third came when there was little in flight.
    return [errors[request.id] for request in requests[len(requests) // 3 :]]


def measure(runner: PipelineRunner, repeats: int) -> dict[str, Any]:
    """Everything, warm."""
    bare = bare_by_rows(runner, repeats)
    best = max(bare, key=lambda rows: bare[rows])
    saturated = statistics.median(saturated_over_bare(runner, best) for _ in range(repeats))
    bare_at_best = partial(bare_rows_per_s, runner, best)
    curve = {
        count: median_over(partial(engine_rows_per_s, runner, count), bare_at_best, repeats)
        for count in CONCURRENT
    }
    images = partial(images_per_bare_row, runner, best)
    gain = statistics.median(images(INTERVAL) / images(1.0) for _ in range(repeats))
    # How much longer requests of a kind take than predicted is learned from such a load.
    prediction_errors(runner, seed=0)
    predicted = [error for seed in PREDICTED_SEEDS for error in prediction_errors(runner, seed)]
    return {
        "bare_rows_per_s": bare,
        "best_rows": best,
        "row_limit": runner.engine.row_limit,
        "near_the_limit": saturated,
        "share_of_bare_by_concurrency": curve,
        "batch_of_eight_ratio": batch_of_eight_ratio(runner, 3 * repeats),
        "interval_gain": gain,
        "prediction_error": statistics.median(predicted),
        "threads": runner.engine.options.threads,
    }


def plot(report: dict[str, Any], file: Path) -> None:
    """Share of the bare denoiser's rows per second over concurrent requests."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    curve = report["share_of_bare_by_concurrency"]
    axes.plot(list(curve), list(curve.values()), marker="o", label="requests through the engine")
    axes.axhline(1, linestyle="--", color="grey", label="bare denoiser in a loop, best rows")
    axes.set(
        xscale="log",
        xticks=list(curve),
        xticklabels=list(curve),
        ylim=(0, None),
        xlabel="concurrent requests (20 steps, guided)",
        ylabel="denoiser rows per second, as a share",
    )
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/bench-limit.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = EngineOptions(max_pending_images=1000, threads=options.threads)
    runner = PipelineRunner(load_model("emoji", EMBEDDED), engine)
    runner.start()
    warm_up(runner)
    report = measure(runner, options.repeats)
    runner.stop()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))
    if options.plot:
        plot(report, options.plot)
    print_table(report)


def print_table(report: dict[str, Any]) -> None:
    """Goals beside what was measured."""
    rows = (
        ("rows/s at saturation over bare denoiser", f"{report['near_the_limit']:.3f}", ">= 0.93"),
        ("batch of 8 over pipe([prompt] * 8)", f"{report['batch_of_eight_ratio']:.3f}", "<= 1.03"),
        ("guidance at 60 % of steps, images/s", f"{report['interval_gain']:.2f}x", ">= 1.2x"),
        ("finish times predicted, median error", f"{report['prediction_error']:.1%}", "<= 15 %"),
        ("row limit as measured", str(report["row_limit"]), ""),
    )
    for name, value, goal in rows:
        print(f"{name:42}{value:>12}   {goal}")


if __name__ == "__main__":
    main()
