"""The embedded model's denoiser: eager against compiled, with inductor.

    python -m loadtests.compile_bench [--rows 2,8,16,32] [--repeats 15] [--threads 2]

It prints the seconds that compiling took, milliseconds of a forward for each row bucket (eager and
compiled in turns, medians), and whether a row has the same bits whatever it shares a forward with:
within a bucket, and from one bucket to another. Absolute times mean nothing elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from stepserve.config import SpeedSettings
from stepserve.domain.models import Compilation
from stepserve.engine.batch_invariance import keep_bits, run_together, same_bits
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.stacking import stack, tensors_in
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import Stage
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import leave_cores_to_engine, load_model
from stepserve.pipelines.modules.compiling import CompiledForward
from stepserve.pipelines.modules.parking import ParkingOptions
from stepserve.pipelines.modules.wrappers import wrappers_of
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.sharing_plan import SharingPlan, row_buckets
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up


@dataclass(frozen=True)
class ForwardTimes:
    """Medians for one row count. `difference`: of the outputs, as a share of their norm."""

    rows: int
    eager_ms: float
    compiled_ms: float
    difference: float
    eager_independent: bool
    compiled_independent: bool


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    compile_s: float
    outcome: Compilation
    remark: str
    same_bytes: bool
    forwards: list[ForwardTimes]
    buckets_that_agree: dict[str, list[list[int]]]


@dataclass(frozen=True, eq=False)
class Bench:
    """A served model, and calls of its denoiser to run again and again."""

    runner: PipelineRunner
    calls: list[Call]

    def on_engine(self, function: Callable[[], Any]) -> Any:
        """Between two ticks, on the thread that graphs are made for."""
        return self.runner.engine.call(function)

    def seconds(self, rows: int, run: Callable[..., Any]) -> float:
        """One forward of so many rows by one of the two codes."""

        def timed() -> float:
            args, kwargs = stack(self.calls[:1], rows)
            started_s = time.perf_counter()
            run(*args, **kwargs)
            return time.perf_counter() - started_s

        return float(self.on_engine(timed))

    def outputs(self, indices: Sequence[int], rows: int, run: Callable[..., Any]) -> list[Any]:
        """Of the calls with these indices together, filled up to `rows`."""
        calls = _run_by([self.calls[index] for index in indices], run)
        return list(self.on_engine(partial(run_together, calls, rows)))


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="2,8,16,32", help="row counts to time")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--fixed-rows", type=int, default=0, help="one bucket instead of many")
    options = parser.parse_args()
    leave_cores_to_engine()
    report = measure(options)
    print_table(report)
    print(json.dumps(asdict(report)))


def measure(options: argparse.Namespace) -> Report:
    """Everything, in a process of its own."""
    model = load_model("emoji", EMBEDDED, "bfloat16", "cpu", SpeedSettings(compile=True))
    engine = EngineOptions(max_rows=options.max_rows, threads=options.threads)
    runner = PipelineRunner(model, engine, sharing=_sharing(options.fixed_rows))
    runner.start()
    warm_up(runner)
    try:
        return _measure(runner, options)
    finally:
        runner.stop()


def _sharing(fixed_rows: int) -> SharingOptions:
    plan = SharingPlan(filled_rows=(fixed_rows,)) if fixed_rows else None
    return SharingOptions(plan=plan)


def _measure(runner: PipelineRunner, options: argparse.Namespace) -> Report:
    started_s = time.perf_counter()
    limits = runner.compile()
    compile_s = time.perf_counter() - started_s
    bench = Bench(runner, runner.engine.call(partial(_calls_of, runner)))
    buckets = (options.fixed_rows,) if options.fixed_rows else row_buckets(options.max_rows)
    wanted = [rows for rows in map(int, options.rows.split(",")) if rows in buckets]
    compiled = _compiled(runner) if limits.compilation is Compilation.COMPILED else None
    eager = bench.calls[0].method.run if compiled is None else compiled.__wrapped__
    codes = {"eager": eager, "compiled": compiled or eager}
    return Report(
        compile_s=compile_s,
        outcome=limits.compilation,
        remark=limits.compilation_remark,
        same_bytes=limits.same_bytes,
        forwards=[_compare(bench, rows, codes, options.repeats) for rows in wanted],
        buckets_that_agree={name: _agreeing(bench, buckets, run) for name, run in codes.items()},
    )


def _compiled(runner: PipelineRunner) -> Any:
    """What runs the denoiser."""
    wrappers = wrappers_of(runner.model.pipeline.unet, "forward")
    return next(wrapper for wrapper in wrappers if isinstance(wrapper, CompiledForward))


def _calls_of(runner: PipelineRunner) -> list[Call]:
    """Calls of the denoiser with equal keys and different content, the fewest rows first."""
    model = runner.model
    options = ParkingOptions(max_rows=64, prompt_cache_bytes=0)
    with parked_at(Stage.DENOISE, model.pipeline, make_probe_requests(model), options) as groups:
        return sorted(groups[0], key=lambda call: call.rows)


def _compare(
    bench: Bench, rows: int, codes: dict[str, Callable[..., Any]], repeats: int
) -> ForwardTimes:
    eager, compiled = codes["eager"], codes["compiled"]
    eager_s, compiled_s = [], []
    for _ in range(repeats):
        eager_s.append(bench.seconds(rows, eager))
        compiled_s.append(bench.seconds(rows, compiled))
    one, other = (tensors_in(bench.outputs([0], rows, run))[0] for run in (eager, compiled))
    difference = (one.float() - other.float()).norm() / one.float().norm()
    return ForwardTimes(
        rows=rows,
        eager_ms=1000 * statistics.median(eager_s),
        compiled_ms=1000 * statistics.median(compiled_s),
        difference=float(difference),
        eager_independent=_independent(bench, rows, eager),
        compiled_independent=_independent(bench, rows, compiled),
    )


def _independent(bench: Bench, rows: int, run: Callable[..., Any]) -> bool:
    """Whether the bits of a call are the same whatever else is in a forward of so many rows."""
    serial = [bench.outputs([index], rows, run)[0] for index in range(len(bench.calls))]
    together = partial(keep_bits, _run_by(bench.calls, run), serial, rows, rows)
    return bool(bench.on_engine(together))


def _run_by(calls: Sequence[Call], run: Callable[..., Any]) -> list[Call]:
    """The same calls, run by one of the two codes."""
    return [replace(call, method=replace(call.method, run=run)) for call in calls]


def _agreeing(bench: Bench, buckets: Sequence[int], run: Callable[..., Any]) -> list[list[int]]:
    """Buckets in which a call has the same bits, together."""
    alike: list[tuple[Any, list[int]]] = []
    for rows in buckets:
        output = bench.outputs([0], rows, run)[0]
        group = next((found for known, found in alike if same_bits(known, output)), None)
        if group is None:
            alike.append((output, [rows]))
        else:
            group.append(rows)
    return [group for _, group in alike]


def print_table(report: Report) -> None:
    """For people."""
    print(
        f"{report.outcome} in {report.compile_s:.0f} s; same bytes at any load: "
        f"{report.same_bytes}. {report.remark}"
    )
    print("rows  eager ms  compiled ms  ratio  difference  independent (eager, compiled)")
    for f in report.forwards:
        print(
            f"{f.rows:4}  {f.eager_ms:8.1f}  {f.compiled_ms:11.1f}  "
            f"{f.eager_ms / f.compiled_ms:5.2f}  {100 * f.difference:8.2f} %  "
            f"{f.eager_independent}, {f.compiled_independent}"
        )
    for name, groups in report.buckets_that_agree.items():
        print(f"{name}: a row has the same bits in each of these buckets: {groups}")


if __name__ == "__main__":
    main()
