"""What same bytes at any load cost: `python -m loadtests.same_bytes_cost`.

In bfloat16 forwards have any row count, so it costs what the engine takes to find that out when it
starts. In float32 forwards are filled up to one row count: throughput is compared, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.probing.sharing_plan import FIXED_ROWS, SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner

from loadtests.engine_bench import mixed_requests, run_engine

GOAL = 0.15


@dataclass(frozen=True)
class Cost:
    """Seconds for sixteen mixed requests, by repeat, and seconds to start.

    Args:
        start_s: of an engine in bfloat16 and in float32, with all that it tries.
        any_rows_s: in float32, where bytes depend on the load.
        filled_rows_s: in float32, where they do not.
    """

    start_s: dict[str, float]
    row_policy: dict[str, str]
    any_rows_s: tuple[float, ...]
    filled_rows_s: tuple[float, ...]

    @property
    def share(self) -> float:
        """By how much medians differ."""
        return statistics.median(self.filled_rows_s) / statistics.median(self.any_rows_s) - 1


def start(model: Path, dtype: str, threads: int, plan: SharingPlan | None) -> PipelineRunner:
    """An engine on a model of its own."""
    loaded = load_model("emoji", model, dtype)
    runner = PipelineRunner(
        loaded, EngineOptions(threads=threads), sharing=SharingOptions(plan=plan)
    )
    runner.start()
    return runner


def measure_start(model: Path, dtype: str, threads: int) -> tuple[float, str]:
    """Median seconds of three starts, and what was found."""
    loaded = load_model("emoji", model, dtype)
    seconds = []
    for _ in range(3):
        runner = PipelineRunner(loaded, EngineOptions(threads=threads))
        started_s = time.perf_counter()
        runner.start()
        seconds.append(time.perf_counter() - started_s)
        runner.stop()
    return statistics.median(seconds), runner.prepared.plan.row_policy


def measure(model: Path, threads: int, repeats: int) -> Cost:
    """Everything, with both kinds of forwards in turns."""
    starts = {dtype: measure_start(model, dtype, threads) for dtype in ("bfloat16", "float32")}
    # Where nothing need be filled up, it is measured what it would cost.
    runners = [start(model, "float32", threads, SharingPlan(same_bytes=False))]
    runners.append(start(model, "float32", threads, None))
    if not runners[1].prepared.plan.filled_rows:
        runners[1].stop()
        runners[1] = start(model, "float32", threads, SharingPlan(filled_rows=(FIXED_ROWS,)))
    requests = mixed_requests()
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-1, repeats):
        for runner, taken in zip(runners, seconds, strict=True):
            took_s, _ = run_engine(runner, requests)
            # The first turn is to warm up.
            if repeat >= 0:
                taken.append(took_s)
    for runner in runners:
        runner.stop()
    return Cost(
        start_s={dtype: took_s for dtype, (took_s, _) in starts.items()},
        row_policy={dtype: policy for dtype, (_, policy) in starts.items()},
        any_rows_s=tuple(seconds[0]),
        filled_rows_s=tuple(seconds[1]),
    )


def main() -> None:
    """Measure, print goals beside it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("out/same-bytes-cost.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cost = measure(options.model, options.threads, options.repeats)
    for dtype, seconds in cost.start_s.items():
        print(f"{dtype}: {cost.row_policy[dtype]}, found out in a start of {seconds:.2f} s")
    medians = statistics.median(cost.any_rows_s), statistics.median(cost.filled_rows_s)
    print(f"float32, any rows: {medians[0]:.2f} s; filled up: {medians[1]:.2f} s")
    print(f"same bytes cost {cost.share:.1%} in float32 (goal: at most {GOAL:.0%})")
    report = {**asdict(cost), "share": cost.share, "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
