"""What is made of the outcomes of a run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.load.client import Outcome, Status
from loadtests.load.trace import HOMOGENEOUS, MIXED, draw_trace
from loadtests.results.measures import (
    LatencyTarget,
    Line,
    Run,
    Unloaded,
    achieved_share,
    find_knee,
    fit_line,
    kind_of,
    make_targets,
    percentile,
    recovery_s,
    slope_per_s,
    steady_per_s,
    summarize,
    summarize_overload,
)

TARGET = LatencyTarget("3x", share=0.9, factor=3)


def outcome(index: int, latency_s: float, status: Status = Status.OK, lag_s: float = 0) -> Outcome:
    """Request `index` of an even beat of one a second."""
    at_s = float(index)
    return Outcome(index, status, at_s, at_s + lag_s, at_s + latency_s)


def run_of(*latencies_s: float, statuses: dict[int, Status] | None = None) -> Run:
    """Each takes one second unloaded; a request's latency is its place in the list."""
    statuses = statuses or {}
    outcomes = [
        outcome(index, latency_s, statuses.get(index, Status.OK))
        for index, latency_s in enumerate(latencies_s)
    ]
    count = len(latencies_s)
    trace = draw_trace(HOMOGENEOUS, count, 0)
    return Run(trace, [float(i) for i in range(count)], outcomes, [1.0] * count)


def windowed(durations_s: list[float], in_flight: int) -> list[Outcome]:
    """Each is sent when another has ended, as `send_windowed` does."""
    free_s = [0.0] * in_flight
    outcomes = []
    for index, duration_s in enumerate(durations_s):
        slot = free_s.index(min(free_s))
        sent_s = free_s[slot]
        free_s[slot] = sent_s + duration_s
        outcomes.append(Outcome(index, Status.OK, sent_s, sent_s, free_s[slot]))
    return outcomes


def test_begin_and_end_of_a_run_do_not_count_for_its_throughput() -> None:
    """Four at a time, two seconds each: two a second, though one takes half a minute at the end."""
    durations_s = [1.9, 2.0, 2.1, 2.0] * 20 + [30.0]
    steady = steady_per_s(windowed(durations_s, 4), [1.0] * 81, 4)
    assert steady == pytest.approx(2.0, rel=0.05)


def test_requests_count_by_their_work() -> None:
    durations_s = [1.0, 3.0] * 60
    steady = steady_per_s(windowed(durations_s, 4), durations_s, 4)
    assert steady == pytest.approx(4 / 2.0, rel=0.05)


def test_one_at_a_time_is_as_fast_as_it_is_whatever_waits() -> None:
    ended_s = [float(i + 1) for i in range(100)]
    sent_s = [0.0] * 8 + ended_s[:-8]
    outcomes = [
        Outcome(i, Status.OK, s, s, e) for i, (s, e) in enumerate(zip(sent_s, ended_s, strict=True))
    ]
    assert steady_per_s(outcomes, [1.0] * 100, 8) == pytest.approx(1.0, rel=0.05)


def test_a_short_run_has_no_steady_part() -> None:
    assert steady_per_s(windowed([1.0] * 15, 4), [1.0] * 15, 4) is None


def test_a_line_goes_through_the_medians() -> None:
    line = fit_line({4: [1.4, 1.4, 9.0], 24: [3.4, 3.4, 3.4]})
    assert line.seconds(0) == pytest.approx(1.0)
    assert line.seconds(10) == pytest.approx(2.0)


def test_noise_never_makes_a_line_that_falls() -> None:
    assert fit_line({4: [2.0], 24: [1.0]}) == Line(2.0, 0.0)


def test_unloaded_seconds_depend_on_kind_and_calls() -> None:
    request = draw_trace(HOMOGENEOUS, 1, 0)[0]
    unloaded = Unloaded({kind_of(request): Line(0.5, 0.1)})
    assert unloaded.seconds(request) == pytest.approx(2.5)
    with pytest.raises(KeyError):
        unloaded.seconds(replace(request, n=2))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_one_of_the_values_and_covers_its_share(values, share) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_what_is_late_refused_or_failed_is_not_in_time() -> None:
    run = run_of(1, 2.9, 3.1, 1, 1, statuses={3: Status.REFUSED, 4: Status.FAILED})
    assert run.in_time_share(TARGET) == pytest.approx(0.4)
    assert not run.is_good(TARGET)
    assert run.late(TARGET) == 3


def test_what_never_ended_is_not_in_time() -> None:
    run = run_of(1, 1, 1, 1)
    assert replace(run, outcomes=run.outcomes[:2]).in_time_share(TARGET) == 0.5


def test_clients_that_meant_to_leave_are_not_judged() -> None:
    run = run_of(1, 1, 50)
    trace = [*run.trace[:2], replace(run.trace[2], cancel_after=0.5)]
    assert replace(run, trace=trace).in_time_share(TARGET) == 1


def test_a_client_that_fell_behind_makes_the_run_void() -> None:
    run = run_of(*[1.0] * 10)
    assert achieved_share(run.outcomes) == 1
    assert not summarize(run, [TARGET])["void"]
    behind = [outcome(index, 2.0, lag_s=0.02 * index) for index in range(10)]
    assert summarize(replace(run, outcomes=behind), [TARGET])["void"]


def test_latency_counts_from_when_a_request_should_have_been_sent() -> None:
    late_client = outcome(5, latency_s=3.0, lag_s=2.5)
    assert late_client.latency_s == 3.0
    assert late_client.lag_s == 2.5


def test_a_summary_has_every_number() -> None:
    run = run_of(1, 2, 3, 4, statuses={3: Status.REFUSED})
    told = summarize(run, make_targets(2.0))
    assert told["counts"] == {"ok": 3, "refused": 1}
    assert told["in_time"] == {
        "3x unloaded, 90 %": 0.75,
        "5x unloaded, 95 %": 0.75,
        "2 s, 90 %": 0.5,
    }
    assert told["latency_s"]["p50"] == 2
    assert told["throughput_per_s"] == pytest.approx(3 / 7)
    assert told["rows_per_s"] == pytest.approx(3 * 40 / 7)
    assert told["refusal_s"]["p99"] == 4
    assert told["batch_share"] is None


def test_short_and_long_requests_are_told_apart() -> None:
    trace = draw_trace(MIXED, 200, 0)
    outcomes = [outcome(i, 0.1 * r.num_inference_steps) for i, r in enumerate(trace)]
    run = Run(trace, [float(i) for i in range(200)], outcomes, [1.0] * 200)
    told = summarize(run, [TARGET])
    assert told["short"]["mean"] == pytest.approx(0.4)
    assert told["long"]["p50"] >= 5


@given(st.integers(-5, 40), st.integers(0, 35))
def test_the_knee_is_the_highest_good_rate(knee, start) -> None:
    asked = []

    async def is_good(index: int) -> bool:
        asked.append(index)
        return index <= knee

    found = asyncio.run(find_knee(is_good, start, lowest=0, highest=35))
    assert found == (None if knee < 0 else min(knee, 35))
    assert len(asked) <= 14
    assert len(set(asked)) == len(asked)
    assert all(0 <= index <= 35 for index in asked)


def test_recovery_is_when_arrivals_stay_in_time() -> None:
    run = run_of(*[1.0] * 10, *[9.0] * 5, *[1.0] * 15)
    assert recovery_s(run, TARGET, from_s=10) == pytest.approx(4, abs=1.1)
    assert recovery_s(run, TARGET, from_s=20) == 0
    assert recovery_s(run_of(*[9.0] * 5), TARGET, from_s=0) is None
    refused = run_of(*[1.0] * 6, *[0.01] * 4, statuses=dict.fromkeys(range(6, 10), Status.REFUSED))
    assert recovery_s(refused, TARGET, from_s=2) == 0


def test_an_overload_is_judged_by_what_arrived_in_it() -> None:
    refused = dict.fromkeys(range(10, 15), Status.REFUSED)
    run = run_of(*[1.0] * 10, *[0.02] * 5, *[1.0] * 4, 9.0, *[1.0] * 10, statuses=refused)
    told = summarize_overload(run, TARGET, begins_s=10, ends_s=20, knee_per_s=0.5)
    assert told["goodput_over_knee"] == pytest.approx(0.8)
    assert (told["admitted"], told["refused"]) == (5, 5)
    assert told["admitted_in_time"] == pytest.approx(0.8)
    assert told["refusal_p99_s"] == pytest.approx(0.02)
    assert told["recovery_s"] == 0
    assert (told["refused_before"], told["refused_after"]) == (0, 0)


def test_a_slope_is_that_of_the_best_line() -> None:
    assert slope_per_s([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope_per_s([(1, 1)]) == 0
