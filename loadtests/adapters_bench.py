"""Requests with different LoRA adapters at once: `python -m loadtests.adapters_bench`.

Sixteen requests go through an engine at once, which have the same steps and differ in what adapters
they name: none, one for all, or eight between them. Of the eight, forwards are shared by all
requests in one engine; in the other each adapter has forwards of its own, which is what an engine
without mixing does. All in turns, in one process; medians are reported, and how far single turns
were from them.

Then many adapters are listed, and each request of a batch names another one: seconds to load them,
seconds of a step, and memory.

    [--requests 16] [--adapters 8] [--steps 20] [--rank 8] [--guided 0] [--listed 64] [--repeats 7]

Without guidance a request has one row, with it two: the more rows each adapter has, the less is
lost where it has forwards of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import AdapterUse, GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import Stage
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.adapters.mixing import RowLayers
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up
from torch import nn

from loadtests.engine_bench import mixed_requests, run_engine

PROMPTS = ("red heart", "pizza", "rocket", "cat face")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
# Small beside the weights, so that images stay images.
STRENGTH = 0.02
# What is to hold of eight adapters between all requests.
LEAST_GAIN = 2.5
# Of the images per second with one adapter for all.
LEAST_SHARE = 1.0


class SeparateAdapters(AdapterCache):
    """Each set of adapters has forwards of its own."""

    def mix(self, row_layers: RowLayers) -> None:
        """Never."""


class DenoiserForwards:
    """Counts the denoiser's forwards of an engine."""

    def __init__(self, runner: PipelineRunner) -> None:
        self.count = 0
        runner.engine.observe(self)

    def forward_ended(self, report: ForwardReport) -> None:
        """Called with each forward."""
        self.count += report.stage == Stage.DENOISE

    def request_ended(self, report: EndReport) -> None:
        """Called with each end."""


@dataclass(frozen=True)
class Load:
    """What is asked of the engines."""

    requests: int = 16
    adapters: int = 8
    steps: int = 20
    rank: int = 8
    guided: int = 0
    listed: int = 64
    repeats: int = 7


@dataclass(frozen=True)
class Turns:
    """Seconds for all requests, by turn, and how many denoiser forwards each turn took."""

    seconds: tuple[float, ...]
    forwards: tuple[int, ...]
    requests: int

    @property
    def images_per_s(self) -> float:
        """Of the median turn."""
        return self.requests / statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """How far the turns are apart: half of them lie within this share of the median."""
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / 2 / statistics.median(self.seconds)


@dataclass(frozen=True)
class Batch:
    """A batch in which each request has another adapter, of many that are listed.

    Args:
        load_s: until the first step of a batch whose adapters are not loaded, less the same of one
            whose are.
        step_s: one denoiser forward of the batch.
        before_bytes: memory of the process when it serves and no adapter is loaded.
        loaded_bytes: with the batch's adapters.
        stacked_bytes: of that, what is stacked of them for the rows of forwards.
        all_bytes: when each listed adapter was used once.
        file_bytes: of one adapter.
    """

    requests: int
    load_s: float
    step_s: float
    step_without_s: float
    before_bytes: int
    loaded_bytes: int
    stacked_bytes: int
    all_bytes: int
    file_bytes: int


def save_adapters(model: LoadedModel, folder: Path, count: int, rank: int) -> list[str]:
    """Write adapters of random weights for every attention layer; returns their names."""
    unet: nn.Module = model.pipeline.unet
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(ATTENTION)
    }
    names = [f"adapter-{number:03}" for number in range(count)]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, layer in layers.items():
            down = torch.randn(rank, layer.in_features, generator=generator) * STRENGTH
            up = torch.randn(layer.out_features, rank, generator=generator) * STRENGTH
            tensors[f"unet.{path}.lora_A.weight"] = down.bfloat16()
            tensors[f"unet.{path}.lora_B.weight"] = up.bfloat16()
        save_file(tensors, folder / f"{name}.safetensors")
    return names


def start(options: argparse.Namespace, folder: Path, loaded: int, mixed: bool) -> PipelineRunner:
    """An engine on a model of its own, with the adapters of a folder."""
    model = load_model("emoji", options.model, options.dtype)
    adapters = AdapterOptions(folder=folder, max_loaded=loaded)
    runner = PipelineRunner(model, EngineOptions(threads=options.threads), adapters)
    if not mixed:
        runner.adapters = SeparateAdapters(model.pipeline, adapters)
    runner.start()
    warm_up(runner)
    return runner


def requests_with(names: Sequence[str], load: Load) -> list[GenerationRequest]:
    """As many as the load says, which name these adapters in turn."""
    first = mixed_requests()[0]
    return [
        replace(
            first,
            id=f"request-{index}",
            prompt=PROMPTS[index % len(PROMPTS)],
            num_inference_steps=load.steps,
            guidance_scale=4.0 if load.guided else 1.0,
            seed=index,
            scheduler="DDIMScheduler",
            adapters=(AdapterUse(names[index % len(names)]),) if names else (),
        )
        for index in range(load.requests)
    ]


def measure_turns(
    mixing: PipelineRunner, separate: PipelineRunner, names: Sequence[str], load: Load
) -> dict[str, Turns]:
    """Every way to serve the requests, in turns; the first turn warms up."""
    ways = {
        "none": (mixing, requests_with((), load)),
        "one for all": (separate, requests_with(names[:1], load)),
        "one for all, by row": (mixing, requests_with(names[:1], load)),
        "mixed": (mixing, requests_with(names, load)),
        "forwards of their own": (separate, requests_with(names, load)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    forwards: dict[str, list[int]] = {way: [] for way in ways}
    counters = {runner: DenoiserForwards(runner) for runner in (mixing, separate)}
    for turn in range(-1, load.repeats):
        for way, (runner, requests) in ways.items():
            before = counters[runner].count
            took_s, _ = run_engine(runner, requests)
            if turn >= 0:
                seconds[way].append(took_s)
                forwards[way].append(counters[runner].count - before)
    return {way: Turns(tuple(seconds[way]), tuple(forwards[way]), load.requests) for way in ways}


def measure_batch(runner: PipelineRunner, names: Sequence[str], load: Load) -> Batch:
    """A batch with an adapter for each request, then all others that are listed."""
    process = psutil.Process()
    bare = requests_with((), load)
    _, step_without_s = _first_and_other_steps(runner, bare)
    before_bytes = process.memory_info().rss
    batches = [
        names[first : first + load.requests] for first in range(0, len(names), load.requests)
    ]
    own = requests_with(batches[0], load)
    cold_s, _ = _first_and_other_steps(runner, own)
    warm_s, step_s = _first_and_other_steps(runner, own)
    loaded_bytes, stacked_bytes = process.memory_info().rss, runner.adapters.stacked_bytes()
    for batch in batches[1:]:
        run_engine(runner, requests_with(batch, load))
    all_bytes = process.memory_info().rss
    file = runner.adapters.options.find(names[0])
    return Batch(
        load.requests,
        cold_s - warm_s,
        step_s,
        step_without_s,
        before_bytes,
        loaded_bytes,
        stacked_bytes,
        all_bytes,
        file.size_bytes,
    )


def _first_and_other_steps(
    runner: PipelineRunner, requests: Sequence[GenerationRequest]
) -> tuple[float, float]:
    """Seconds until the last request began its first step, and of one denoiser forward."""
    before = replace(runner.engine.counters)
    _, finished = run_engine(runner, list(requests))
    after = runner.engine.counters
    guidance = runner.model.capabilities.guidance
    rows_at_once = sum(guidance.rows_of(request) for request in requests)
    # Forwards with fewer rows are parts of one.
    forwards = (after.denoiser_rows - before.denoiser_rows) / rows_at_once
    first_s = max(answer.timings.first_step_s for answer in finished)
    return first_s, (after.denoiser_s - before.denoiser_s) / forwards


def measure(options: argparse.Namespace, load: Load) -> tuple[dict[str, Turns], Batch]:
    """Everything, on engines of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model("emoji", options.model, options.dtype)
        count = max(load.adapters, load.listed)
        names = save_adapters(model, Path(folder), count, load.rank)
        mixing = start(options, Path(folder), load.requests, mixed=True)
        separate = start(options, Path(folder), load.requests, mixed=False)
        try:
            batch = measure_batch(mixing, names[: load.listed], load)
            turns = measure_turns(mixing, separate, names[: load.adapters], load)
        finally:
            mixing.stop()
            separate.stop()
    return turns, batch


def main() -> None:
    """Measure, print goals beside it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Load()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("out/adapters-bench.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = Load(**{name: getattr(options, name) for name in asdict(Load())})
    turns, batch = measure(options, load)
    print_report(turns, batch)
    report: dict[str, Any] = {
        "load": asdict(load),
        "turns": {way: asdict(each) for way, each in turns.items()},
        "batch": asdict(batch),
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))


def print_report(turns: dict[str, Turns], batch: Batch) -> None:
    """Images per second of each way, and what the batch took."""
    for way, each in turns.items():
        print(
            f"{way:24}{each.images_per_s:8.2f} images/s  +- {each.spread:.1%}"
            f"  {statistics.median(each.forwards):.0f} forwards"
        )
    mixed = turns["mixed"].images_per_s
    separate = turns["forwards of their own"].images_per_s
    limit = turns["none"].images_per_s / separate
    share = mixed / turns["one for all"].images_per_s
    print(
        f"mixed over forwards of their own: {mixed / separate:.2f}x (goal: at least {LEAST_GAIN}; "
        f"requests without adapters: {limit:.2f}x)"
    )
    print(
        f"mixed over one for all: {share:.2f}x (goal: at least {LEAST_SHARE}, but for the spread)"
    )
    print(
        f"{batch.requests} adapters in a batch: {batch.load_s:.2f} s to load, "
        f"{batch.step_s * 1000:.1f} ms a step ({batch.step_without_s * 1000:.1f} without)"
    )
    sizes = {
        "a file": batch.file_bytes,
        "the process without adapters": batch.before_bytes,
        "with the batch's": batch.loaded_bytes,
        "of that stacked": batch.stacked_bytes,
        "after all that are listed": batch.all_bytes,
    }
    print("memory: " + ", ".join(f"{name} {size / 2**20:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
