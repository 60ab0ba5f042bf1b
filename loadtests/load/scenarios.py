"""What is done to a server: calibrate, offline, server, sweep, knee, overload."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import aiohttp

from loadtests.load.client import (
    DEFAULT_GIVE_UP_S,
    Outcome,
    Patience,
    Status,
    endless_patience,
    send_open_loop,
    send_windowed,
)
from loadtests.load.trace import (
    TraceRequest,
    arrivals_at,
    arrivals_through,
    draw_gaps,
)
from loadtests.load.watch import watched
from loadtests.results.measures import (
    LEAST_ACHIEVED,
    LatencyTarget,
    Run,
    Unloaded,
    achieved_share,
    find_knee,
    fit_line,
    kind_of,
    latency_by_second,
    steady_per_s,
    summarize,
    summarize_overload,
)

CALIBRATION_STEPS = (4, 24)
SWEEP_FACTORS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5, 2.0)
GRID_RATIO = 1.1
"""Rates of a knee search are powers of this times the capacity: so exact is the knee."""

LEAST_KNEE_RUN_S = 60.0
GRID_LOWEST, GRID_HIGHEST = -25, 20
GRID_START = -4
CALM_BEFORE_S, OVERLOAD_S, CALM_AFTER_S = 20.0, 60.0, 60.0
CALM_SHARE, OVERLOAD_FACTOR = 0.7, 2.0
SETTLE_TIMEOUT_S = 300.0
MOST_PROBES, PROBE_PAUSE_S = 8, 0.5
START_TIMEOUT_S = 180.0
PLOT_WINDOW_S = 1.0


class SettleError(RuntimeError):
    """The server did not come to rest between two runs."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A server, the trace it is measured with, and the targets it is judged by.

    Args:
        model: whose batches are watched; None: they are not.
        send_deadlines: whether requests tell the server their latency target, in `deadline_s`.
            Servers that do not know that field must not be sent it.
    """

    session: aiohttp.ClientSession
    trace: Sequence[TraceRequest]
    gaps: Sequence[float]
    unloaded: Unloaded
    targets: Sequence[LatencyTarget]
    model: str | None = None
    send_deadlines: bool = False
    give_up_s: float = DEFAULT_GIVE_UP_S
    knee_runs: dict[int, Run] = field(default_factory=dict)

    def first(self, count: int) -> Bench:
        """The same with a shorter trace. Its gaps have a mean of exactly 1 again."""
        gaps = self.gaps[:count]
        mean = sum(gaps) / len(gaps) if gaps else 1.0
        return replace(self, trace=self.trace[:count], gaps=[gap / mean for gap in gaps])

    def unloaded_s(self) -> list[float]:
        """Of each request of the trace."""
        return [self.unloaded.seconds(request) for request in self.trace]


async def calibrate(
    session: aiohttp.ClientSession, trace: Sequence[TraceRequest], repeats: int = 3
) -> Unloaded:
    """Send requests of each kind one at a time; kinds take turns."""
    examples = {kind_of(request): replace(request, cancel_after=None) for request in trace}
    few, many = CALIBRATION_STEPS
    seconds: dict[str, dict[int, list[float]]] = {kind: {} for kind in examples}
    for example in examples.values():  # warms up
        await serial_s(session, replace(example, num_inference_steps=few))
    for _, (kind, example), steps in product(range(repeats), examples.items(), (few, many)):
        request = replace(example, num_inference_steps=steps)
        taken_s = await serial_s(session, request)
        seconds[kind].setdefault(request.denoiser_calls, []).append(taken_s)
    return Unloaded({kind: fit_line(found) for kind, found in seconds.items()})


async def wait_until_serving(session: aiohttp.ClientSession, request: TraceRequest) -> None:
    """Wait until a request is answered. Only ours tells by itself whether it is ready.

    Raises:
        SettleError: it never was.
    """
    probe = replace(request, num_inference_steps=4, n=1, strength=None, cancel_after=None)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        (outcome,) = await send_open_loop(session, [probe], [0.0], endless_patience(1))
        if outcome.status is Status.OK:
            return
        await asyncio.sleep(0.5)
    raise SettleError(f"no answer within {START_TIMEOUT_S:.0f} s: {outcome.detail}")


async def serial_s(session: aiohttp.ClientSession, request: TraceRequest) -> float:
    """Seconds of one request that has the server to itself.

    Raises:
        RuntimeError: it was not served.
    """
    (outcome,) = await send_open_loop(session, [request], [0.0], endless_patience(1))
    if outcome.status is not Status.OK:
        raise RuntimeError(f"{kind_of(request)}: {outcome.status} {outcome.detail}")
    return outcome.latency_s


async def settle(bench: Bench) -> None:
    """Wait until a short request takes about as long as it should on an idle server.

    Where other programs share the machine it may never do so: after some answers in a row, what was
    running before them has long been done.

    Raises:
        SettleError: it was not answered at all.
    """
    probe = replace(bench.trace[0], num_inference_steps=4, cancel_after=None)
    limit_s = 2 * bench.unloaded.seconds(probe) + 0.1
    deadline_s, responses = time.monotonic() + SETTLE_TIMEOUT_S, 0
    while time.monotonic() < deadline_s:
        (outcome,) = await send_open_loop(bench.session, [probe], [0.0], endless_patience(1))
        is_answered = outcome.status is Status.OK
        responses += is_answered
        if responses == MOST_PROBES or (is_answered and outcome.latency_s <= limit_s):
            return
        await asyncio.sleep(PROBE_PAUSE_S)
    raise SettleError("a short request is not answered any more")


async def offline(bench: Bench, in_flight: int) -> dict[str, Any]:
    """MLPerf's offline scenario: everything is there from the start. Tells the throughput.

    `throughput_per_s` is that of a server that is never short of work, `overall_per_s` of the run.
    """
    trace = [replace(request, cancel_after=None) for request in bench.trace]
    async with watched(bench.session, bench.model) as occupancy:
        outcomes = await send_windowed(bench.session, trace, in_flight)
    ok = [outcome for outcome in outcomes if outcome.status is Status.OK]
    seconds = max((outcome.ended_s for outcome in outcomes), default=0.0)
    rows = sum(trace[o.index].rows * trace[o.index].denoiser_calls for o in ok)
    overall_per_s = len(ok) / seconds
    return {
        "requests": len(trace),
        "ok": len(ok),
        "in_flight": in_flight,
        "seconds": seconds,
        "throughput_per_s": steady_per_s(outcomes, bench.unloaded_s(), in_flight) or overall_per_s,
        "overall_per_s": overall_per_s,
        "images_per_s": sum(trace[o.index].n for o in ok) / seconds,
        "rows_per_s": rows / seconds,
        "occupancy": occupancy.told(),
        "complaints": sorted({o.detail for o in outcomes if o.detail})[:5],
    }


async def run_arrivals(bench: Bench, arrivals: Sequence[float], stop_early: bool = False) -> Run:
    """Send the trace at these moments.

    Args:
        stop_early: break off once every target is missed beyond hope.
    """
    bench = bench.first(len(arrivals))
    unloaded_s = bench.unloaded_s()
    run = Run(bench.trace, arrivals, [], unloaded_s)
    broken_off = False

    def is_hopeless(ended: Sequence[Outcome], now_s: float) -> bool:
        nonlocal broken_off
        broken_off = stop_early and _is_hopeless(replace(run, outcomes=ended), bench, now_s)
        return broken_off

    async with watched(bench.session, bench.model) as occupancy:
        outcomes = await send_open_loop(
            bench.session, bench.trace, arrivals, _patience(bench, unloaded_s), is_hopeless
        )
    return replace(run, outcomes=outcomes, broken_off=broken_off, occupancy=occupancy.told())


def _patience(bench: Bench, unloaded_s: Sequence[float]) -> Patience:
    strictest = bench.targets[0]
    return Patience(
        tuple(
            None if request.cancel_after is None else request.cancel_after * seconds
            for request, seconds in zip(bench.trace, unloaded_s, strict=True)
        ),
        tuple(
            round(strictest.seconds(seconds), 3) if bench.send_deadlines else None
            for seconds in unloaded_s
        ),
        bench.give_up_s,
    )


def _is_hopeless(run: Run, bench: Bench, now_s: float) -> bool:
    """Whether so many are late already that no target can be met any more."""
    ended = {outcome.index for outcome in run.outcomes}
    waiting = [
        (index, now_s - at_s)
        for index, at_s in enumerate(run.arrivals)
        if at_s < now_s and index not in ended and run.trace[index].cancel_after is None
    ]
    return all(
        run.late(target)
        + sum(waited_s > target.seconds(run.unloaded_s[index]) for index, waited_s in waiting)
        > (1 - target.share) * run.expected
        for target in bench.targets
    )


async def server(bench: Bench, rate_per_s: float) -> dict[str, Any]:
    """MLPerf's server scenario: Poisson arrivals at one rate."""
    await settle(bench)
    run = await run_arrivals(bench, arrivals_at(rate_per_s, bench.gaps))
    return summarize(run, bench.targets)


async def sweep(
    bench: Bench, capacity_per_s: float, factors: Sequence[float] = SWEEP_FACTORS
) -> list[dict[str, Any]]:
    """Poisson arrivals at shares and multiples of a capacity."""
    told = []
    for factor in factors:
        summary = await server(bench, factor * capacity_per_s)
        told.append({"factor": factor, **summary})
        print_progress(f"{factor:.1f}x capacity", summary)
    return told


async def knees(
    bench: Bench, requests: int, capacity_per_s: float, start: int = GRID_START
) -> dict[str, Any]:
    """For each target, the highest Poisson rate at which enough requests are in time.

    Rates lie on a grid, and what was sent at one rate is judged by every target.

    Args:
        bench: with a trace that is long enough for the highest rate.
        requests: of each run, at least.
        capacity_per_s: the rate of index 0.
        start: the index that is tried first.
    """
    found: dict[str, Any] = {}
    for target in bench.targets:

        async def is_good(index: int, target: LatencyTarget = target) -> bool:
            run = await _run_on_grid(bench, requests, capacity_per_s, index)
            print(f"  {rate_at(capacity_per_s, index):.2f}/s: {run.in_time_share(target):.0%}")
            return run.is_good(target)

        index = await find_knee(is_good, start, GRID_LOWEST, GRID_HIGHEST)
        found[target.name] = None if index is None else rate_at(capacity_per_s, index)
        start = start if index is None else index
        print(f"knee for {target.name}: {found[target.name]}", flush=True)
    runs = [
        {"rate_per_s": rate_at(capacity_per_s, index), **summarize(run, bench.targets)}
        for index, run in sorted(bench.knee_runs.items())
    ]
    return {"grid_ratio": GRID_RATIO, "knees_per_s": found, "runs": runs}


def rate_at(capacity_per_s: float, index: int) -> float:
    """One rate of the grid."""
    return float(capacity_per_s * GRID_RATIO**index)


def long_enough(requests: int, rate_per_s: float) -> int:
    """Requests of a run at this rate: a queue must have had time to make them late."""
    return max(requests, math.ceil(rate_per_s * LEAST_KNEE_RUN_S))


async def _run_on_grid(bench: Bench, requests: int, capacity_per_s: float, index: int) -> Run:
    if index not in bench.knee_runs:
        await settle(bench)
        rate_per_s = rate_at(capacity_per_s, index)
        short = bench.first(long_enough(requests, rate_per_s))
        run = await run_arrivals(short, arrivals_at(rate_per_s, short.gaps), stop_early=True)
        if achieved_share(run.outcomes) < LEAST_ACHIEVED:
            print("  VOID: the client fell behind")
        bench.knee_runs[index] = run
    return bench.knee_runs[index]


async def overload(bench: Bench, knee_per_s: float, seed: int) -> dict[str, Any]:
    """A calm, a minute at twice the knee, and a calm again."""
    phases = (
        (CALM_SHARE * knee_per_s, CALM_BEFORE_S),
        (OVERLOAD_FACTOR * knee_per_s, OVERLOAD_S),
        (CALM_SHARE * knee_per_s, CALM_AFTER_S),
    )
    gaps = draw_gaps(len(bench.trace), seed)
    arrivals = arrivals_through(phases, gaps)
    if len(arrivals) == len(bench.trace):
        raise ValueError(f"an overload at this rate takes more than {len(arrivals)} requests")
    await settle(bench)
    run = await run_arrivals(bench, arrivals)
    ends_s = CALM_BEFORE_S + OVERLOAD_S
    return {
        **summarize_overload(run, bench.targets[0], CALM_BEFORE_S, ends_s, knee_per_s),
        "begins_s": CALM_BEFORE_S,
        "ends_s": ends_s,
        "latency_by_second": latency_by_second(run, PLOT_WINDOW_S),
        "run": summarize(run, bench.targets),
    }


def print_progress(name: str, summary: dict[str, Any]) -> None:
    """One line for each run that has ended."""
    in_time = ", ".join(f"{key}: {share:.0%}" for key, share in summary["in_time"].items())
    print(
        f"{name:14} offered {summary['offered_rate_per_s']:.2f}/s, "
        f"served {summary['throughput_per_s']:.2f}/s, p50 {shown(summary['latency_s']['p50'])} s, "
        f"p99 {shown(summary['latency_s']['p99'])} s; {in_time}"
        f"{'; VOID: the client fell behind' if summary['void'] else ''}",
        flush=True,
    )


def shown(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
