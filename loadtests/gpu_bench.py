"""The engine on a CUDA device against plain diffusers, with and without CUDA graphs.

    python -m loadtests.gpu_bench [--repeats 3] [--out out/bench-gpu.json]

Twice: with the embedded model at 64x64, and with a model of Stable Diffusion 1.5's layout and size
at 512x512 (random weights: its images are noise, its costs are not). The requests are those of
`engine_bench`: sixteen at once that agree on nothing. Also counted: how often the engine's thread
waits for the device in a tick, where it need not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from stepserve.config import SpeedSettings
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.modules.wrappers import graphs_of
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up

from loadtests.engine_bench import Comparison, compare, mixed_requests, run_engine
from loadtests.sized_models import build_stable_diffusion

DEVICE = "cuda"
ROWS = (1, 2, 4, 8, 16, 32, 64)
# What a wait would be for: all of a forward, instead of waking tracks meanwhile.
SYNC = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Case:
    """A model and a size."""

    name: str
    folder: Path
    size: int
    graphs: bool


@dataclass(frozen=True)
class Measured:
    """What was seen of one case.

    Args:
        step_ms: of a bare denoiser forward, eager and as the engine runs it, by its rows.
        waits_per_forward: synchronizing operations on the engine's thread.
        waits: the most frequent of them, by where they are.
    """

    case: str
    graphs: int
    row_limit: int
    row_policy: str
    same_bytes: bool
    comparison: Comparison
    step_ms: dict[int, tuple[float, float]]
    waits_per_forward: float
    waits: dict[str, int]


def measure(case: Case, repeats: int) -> Measured:
    """One case from load to end."""
    plain = load_model("emoji", case.folder, device=DEVICE)
    speed = SpeedSettings(cuda_graphs=case.graphs)
    served = load_model("emoji", case.folder, device=DEVICE, speed=speed)
    runner = PipelineRunner(served, EngineOptions(threads=4))
    runner.start()
    warm_up(runner)
    requests = mixed_requests(case.size)
    # Graphs are recorded when a shape comes the second time, and requests meet at random.
    for _ in range(3):
        run_engine(runner, requests)
    comparison = compare(runner, plain.pipeline, requests, repeats)
    waits, forwards = count_waits(runner, requests)
    step_ms = runner.engine.call(lambda: step_milliseconds(plain, served, case.size))
    measured = Measured(
        case.name,
        sum(graph.recorded for graph in graphs_of(runner.model.pipeline)),
        runner.engine.row_limit,
        runner.prepared.plan.row_policy,
        runner.prepared.plan.same_bytes,
        comparison,
        step_ms,
        sum(waits.values()) / forwards,
        dict(waits.most_common(12)),
    )
    runner.stop()
    return measured


def step_milliseconds(
    plain: LoadedModel, served: LoadedModel, size: int
) -> dict[int, tuple[float, float]]:
    """Milliseconds of a denoiser forward by its rows: eager, and as it is served."""
    unets = plain.pipeline.unet, served.pipeline.unet
    side = size // plain.pipeline.vae_scale_factor
    found = {}
    for rows in ROWS:
        config, dtype = unets[0].config, unets[0].dtype
        sample = torch.randn(rows, config.in_channels, side, side, device=DEVICE, dtype=dtype)
        text = torch.randn(rows, 32, config.cross_attention_dim, device=DEVICE, dtype=dtype)
        timesteps = torch.full((rows,), 500)
        eager, as_served = (_milliseconds(unet, sample, timesteps, text) for unet in unets)
        found[rows] = eager, as_served
    return found


def _milliseconds(unet: Any, *arguments: Any, repeats: int = 10) -> float:
    for _ in range(3):
        unet(*arguments)
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(repeats):
        unet(*arguments)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started_s) / repeats


def count_waits(
    runner: PipelineRunner, requests: Sequence[GenerationRequest]
) -> tuple[Counter[str], int]:
    """Synchronizing operations of the engine's thread while it serves, and forwards."""
    waits: Counter[str] = Counter()
    engine_thread: int = runner.engine.call(threading.get_ident)

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if SYNC in str(message) and threading.get_ident() == engine_thread:
            waits[f"{Path(filename).name}:{lineno}"] += 1

    before = runner.engine.counters.forwards
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        runner.engine.call(lambda: torch.cuda.set_sync_debug_mode("warn"))
        run_engine(runner, list(requests))
        runner.engine.call(lambda: torch.cuda.set_sync_debug_mode("default"))
    return waits, runner.engine.counters.forwards - before


def tell(measured: Measured) -> None:
    """A table of one case."""
    comparison = measured.comparison
    print(f"\n{measured.case}: {measured.graphs} graphs, row limit {measured.row_limit}")
    print(f"  {measured.row_policy}; same bytes at any load: {measured.same_bytes}")
    print(f"  throughput over plain diffusers  {comparison.speedup:.2f}x")
    print(f"  byte-identical to plain          {comparison.identical}/{comparison.images}")
    print(f"  rows per forward                 {comparison.rows_per_forward:.1f}")
    print(f"  time outside forwards            {comparison.outside_share:.1%}")
    print(f"  waits for the device per forward {measured.waits_per_forward:.1f}")
    for rows, (eager_ms, served_ms) in measured.step_ms.items():
        print(f"  {rows:3} rows: eager {eager_ms:6.2f} ms, as served {served_ms:6.2f} ms")
    for place, count in measured.waits.items():
        print(f"    {count:4} x {place}")


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder)
        build_stable_diffusion(large, DEVICE)
        cases = [
            Case("embedded 64x64, eager", EMBEDDED, 64, graphs=False),
            Case("embedded 64x64, graphs", EMBEDDED, 64, graphs=True),
            Case("SD 1.5 size 512x512, eager", large, 512, graphs=False),
            Case("SD 1.5 size 512x512, graphs", large, 512, graphs=True),
        ]
        measured = []
        for case in (case for case in cases if options.only in case.name):
            measured.append(measure(case, options.repeats))
            tell(measured[-1])
            torch.cuda.empty_cache()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cases": [asdict(one) for one in measured],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
