"""What a run's outcomes say: unloaded times, latency targets, statistics, the knee. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from loadtests.load.client import Outcome, Status
from loadtests.load.trace import TraceRequest, offered_rate_per_s

LEAST_ACHIEVED = 0.99
"""A run that sent at less than this share of the offered rate is void."""

SHORT_STEPS = 4
LONG_STEPS = 50


@dataclass(frozen=True)
class Line:
    """Seconds of a request: some for itself, and some for each call of the denoiser."""

    fixed_s: float
    per_call_s: float

    def seconds(self, calls: int) -> float:
        """For so many calls."""
        return self.fixed_s + self.per_call_s * calls


@dataclass(frozen=True)
class Unloaded:
    """How long each kind of request takes while nothing else is running."""

    lines: Mapping[str, Line]

    def seconds(self, request: TraceRequest) -> float:
        """Of one request.

        Raises:
            KeyError: its kind was not measured.
        """
        return self.lines[kind_of(request)].seconds(request.denoiser_calls)


def kind_of(request: TraceRequest) -> str:
    """Requests of one kind differ in time by their number of denoiser calls only.

    Schedulers are left out: they differ by less than 2 % of a step.
    """
    guided = "guided" if request.guidance_scale > 1 else "plain"
    task = "edit" if request.strength is not None else "generation"
    return f"{request.size} x{request.n} {guided} {task}"


def fit_line(seconds_by_calls: Mapping[int, Sequence[float]]) -> Line:
    """Through the medians of two call counts; never one that falls."""
    (few, few_s), (many, many_s) = sorted(
        (calls, statistics.median(seconds)) for calls, seconds in seconds_by_calls.items()
    )
    per_call_s = max((many_s - few_s) / (many - few), 0.0)
    return Line(max(few_s - few * per_call_s, 0.0), per_call_s)


@dataclass(frozen=True)
class LatencyTarget:
    """In time is a request within `factor` times its unloaded seconds, or within `limit_s`.

    A rate is good if at least `share` of requests are in time.
    """

    name: str
    share: float
    factor: float | None = None
    limit_s: float | None = None

    def seconds(self, unloaded_s: float) -> float:
        """For a request that takes so long unloaded."""
        if self.factor is not None:
            return self.factor * unloaded_s
        assert self.limit_s is not None
        return self.limit_s


def make_targets(limit_s: float) -> tuple[LatencyTarget, ...]:
    """The three that are reported."""
    return (
        LatencyTarget("3x unloaded, 90 %", share=0.9, factor=3),
        LatencyTarget("5x unloaded, 95 %", share=0.95, factor=5),
        LatencyTarget(f"{limit_s:g} s, 90 %", share=0.9, limit_s=limit_s),
    )


@dataclass(frozen=True)
class Run:
    """Requests that were sent at a rate, and what became of them. `unloaded_s` is by request."""

    trace: Sequence[TraceRequest]
    arrivals: Sequence[float]
    outcomes: Sequence[Outcome]
    unloaded_s: Sequence[float]
    broken_off: bool = False
    occupancy: Mapping[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> list[Outcome]:
        """Of clients that did not mean to leave."""
        return [o for o in self.outcomes if self.trace[o.index].cancel_after is None]

    @property
    def expected(self) -> int:
        """How many are to be judged, those of a run broken off included."""
        return sum(request.cancel_after is None for request in self.trace[: len(self.arrivals)])

    def is_in_time(self, outcome: Outcome, target: LatencyTarget) -> bool:
        """Whether a request was answered, and within the target."""
        limit_s = target.seconds(self.unloaded_s[outcome.index])
        return outcome.status is Status.OK and outcome.latency_s <= limit_s

    def in_time_share(self, target: LatencyTarget) -> float:
        """Refused, failed and never-ended requests are not in time."""
        in_time = sum(self.is_in_time(outcome, target) for outcome in self.judged)
        return in_time / self.expected if self.expected else 1.0

    def is_good(self, target: LatencyTarget) -> bool:
        """Whether as many were in time as the target asks for."""
        return self.in_time_share(target) >= target.share

    def late(self, target: LatencyTarget) -> int:
        """How many have ended that were not in time."""
        return sum(not self.is_in_time(outcome, target) for outcome in self.judged)


def achieved_share(outcomes: Sequence[Outcome]) -> float:
    """The rate at which requests were sent, over that at which they should have been."""
    if not outcomes:
        return 0.0
    intended_s = max(outcome.intended_s for outcome in outcomes)
    sent_s = max(outcome.sent_s for outcome in outcomes)
    return intended_s / sent_s if sent_s > 0 else 1.0


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least `share` of all are not over; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    known = list(values)
    return statistics.fmean(known) if known else None


def summarize(run: Run, targets: Sequence[LatencyTarget]) -> dict[str, Any]:
    """Everything that is reported of a run."""
    ok = [outcome for outcome in run.judged if outcome.status is Status.OK]
    ends_s = max((outcome.ended_s for outcome in run.outcomes), default=0.0)
    share = achieved_share(run.outcomes)
    return {
        "offered_rate_per_s": offered_rate_per_s(run.arrivals),
        "achieved_share": share,
        "void": share < LEAST_ACHIEVED,
        "broken_off": run.broken_off,
        "requests": len(run.arrivals),
        "counts": dict(Counter(outcome.status.value for outcome in run.outcomes)),
        "seconds": ends_s,
        "throughput_per_s": len(ok) / ends_s if ends_s else 0.0,
        "images_per_s": sum(run.trace[o.index].n for o in ok) / ends_s if ends_s else 0.0,
        "rows_per_s": sum(_row_calls(run.trace[o.index]) for o in ok) / ends_s if ends_s else 0.0,
        "in_time": {target.name: run.in_time_share(target) for target in targets},
        "latency_s": _spread(outcome.latency_s for outcome in ok),
        "slowdown": _spread(o.latency_s / run.unloaded_s[o.index] for o in ok),
        "short": _of_steps(run, ok, lambda steps: steps <= SHORT_STEPS),
        "long": _of_steps(run, ok, lambda steps: steps >= LONG_STEPS),
        "queue_s": _spread(o.queue_s for o in ok if o.queue_s is not None),
        "first_step_s": _spread(o.first_step_s for o in ok if o.first_step_s is not None),
        "batch_share": mean(o.batch_share for o in ok if o.batch_share is not None),
        "occupancy": dict(run.occupancy),
        "refusal_s": _spread(o.latency_s for o in run.outcomes if o.status is Status.REFUSED),
        "lag_s": _spread(outcome.lag_s for outcome in run.outcomes),
        "complaints": sorted({o.detail for o in run.outcomes if o.detail})[:5],
    }


def _row_calls(request: TraceRequest) -> int:
    return request.rows * request.denoiser_calls


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    known = list(values)
    return {
        "mean": mean(known),
        "p50": percentile(known, 0.5),
        "p95": percentile(known, 0.95),
        "p99": percentile(known, 0.99),
    }


def _of_steps(
    run: Run, outcomes: Sequence[Outcome], belongs: Callable[[int], bool]
) -> dict[str, Any]:
    chosen = [o for o in outcomes if belongs(run.trace[o.index].num_inference_steps)]
    return {
        "requests": len(chosen),
        **_spread(o.latency_s for o in chosen),
        "unloaded_mean": mean(run.unloaded_s[o.index] for o in chosen),
    }


def steady_per_s(
    outcomes: Sequence[Outcome], work_s: Sequence[float], in_flight: int
) -> float | None:
    """Requests a second of a server that always had `in_flight` of them, without begin and end.

    While the last ones end there is less and less to do at once, which makes a short run of a
    server that shares work look slower than the server is. So it is looked at from when twice the
    window was sent until the last request is. Of a request on an edge counts the share of its time
    that lies inside; as many are cut by the one edge as by the other. Each request counts by its
    work, as it may be large or small ones that a server happens to have done by then.

    Args:
        work_s: of each request, in any unit that is common to all.

    Returns:
        None if the run is too short for that.
    """
    sent_s = sorted(outcome.sent_s for outcome in outcomes)
    if len(sent_s) < 4 * in_flight:
        return None
    begin_s, end_s = sent_s[2 * in_flight], sent_s[-1]
    done = sum(
        work_s[outcome.index] * _share_inside(outcome, begin_s, end_s)
        for outcome in outcomes
        if outcome.status is Status.OK
    )
    return done / (sum(work_s) / len(work_s)) / (end_s - begin_s)


def _share_inside(outcome: Outcome, begin_s: float, end_s: float) -> float:
    inside_s = min(outcome.ended_s, end_s) - max(outcome.sent_s, begin_s)
    return max(inside_s, 0.0) / max(outcome.ended_s - outcome.sent_s, 1e-9)


async def find_knee(
    is_good: Callable[[int], Awaitable[bool]], start: int, lowest: int, highest: int
) -> int | None:
    """The highest index of a grid of rates that is good, if rates below a good one are good.

    Doubles its stride from `start` on until it has a good and a bad one, then halves the gap.

    Returns:
        None if even the lowest is bad.
    """
    good, bad = lowest - 1, highest + 1
    index, stride = start, 1
    while bad - good > 1:
        if await is_good(index):
            good = index
        else:
            bad = index
        if good >= lowest and bad <= highest:
            index = (good + bad) // 2
            continue
        index = min(good + stride, highest) if good >= lowest else max(bad - stride, lowest)
        stride *= 2
    return good if good >= lowest else None


def recovery_s(run: Run, target: LatencyTarget, from_s: float) -> float | None:
    """Seconds after `from_s` from which on `target.share` of what is let in is in time, for good.

    Where deadlines are promised, some are turned away in calm as well: that is told apart.

    Returns:
        None if it did not recover before the run ended; 0 if it never stopped being in time.
    """
    after = sorted(
        (o for o in run.judged if o.intended_s >= from_s and o.status is not Status.REFUSED),
        key=lambda outcome: outcome.intended_s,
    )
    in_time = late_seen = 0
    recovered_at: float | None = None
    # From the last arrival backwards: the longest tail in which enough are in time.
    for outcome in reversed(after):
        is_in_time = run.is_in_time(outcome, target)
        in_time, late_seen = in_time + is_in_time, late_seen + (not is_in_time)
        if is_in_time and in_time >= target.share * (in_time + late_seen):
            recovered_at = outcome.intended_s
    if recovered_at is None:
        return None
    return 0.0 if after[0].intended_s == recovered_at else recovered_at - from_s


def refused_share(outcomes: Iterable[Outcome]) -> float | None:
    """How many were turned away; None of none."""
    refused = [outcome.status is Status.REFUSED for outcome in outcomes]
    return sum(refused) / len(refused) if refused else None


def summarize_overload(
    run: Run, target: LatencyTarget, begins_s: float, ends_s: float, knee_per_s: float
) -> dict[str, Any]:
    """What happened between `begins_s` and `ends_s`, and after."""
    during = [o for o in run.judged if begins_s <= o.intended_s < ends_s]
    # What answers 429 or 503 was refused; all others were accepted.
    admitted = [o for o in during if o.status is not Status.REFUSED]
    in_time = sum(run.is_in_time(outcome, target) for outcome in during)
    refused = [o.latency_s for o in during if o.status is Status.REFUSED]
    goodput_per_s = in_time / (ends_s - begins_s)
    limits_s = [target.seconds(seconds) for seconds in run.unloaded_s]
    return {
        "target": target.name,
        "knee_per_s": knee_per_s,
        "goodput_per_s": goodput_per_s,
        "goodput_over_knee": goodput_per_s / knee_per_s,
        "admitted": len(admitted),
        "refused": len(refused),
        "admitted_in_time": in_time / len(admitted) if admitted else None,
        "refusal_p99_s": percentile(refused, 0.99),
        "recovery_s": recovery_s(run, target, ends_s),
        "refused_before": refused_share(o for o in run.judged if o.intended_s < begins_s),
        "refused_after": refused_share(o for o in run.judged if o.intended_s >= ends_s),
        "mean_target_s": mean(limits_s),
    }


def latency_by_second(run: Run, width_s: float) -> list[tuple[float, float]]:
    """(start of a window, median latency of what arrived in it) for plots."""
    windows: dict[int, list[float]] = defaultdict(list)
    for outcome in run.judged:
        if outcome.status is Status.OK:
            windows[int(outcome.intended_s // width_s)].append(outcome.latency_s)
    return [(index * width_s, statistics.median(found)) for index, found in sorted(windows.items())]


def slope_per_s(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that fits best; 0 for fewer than two points."""
    if len(points) < 2 or all(one[0] == other[0] for one, other in pairwise(points)):
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope
