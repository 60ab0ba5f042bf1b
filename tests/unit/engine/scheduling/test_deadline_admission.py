"""Who is refused for a deadline, when to come back, and what that takes to decide."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine_fakes import Ear, Job, Modules, job_track
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.errors import ServerFullError, UnmeetableDeadlineError
from stepserve.engine.loop.engine import STALE_S, Engine, EngineOptions
from stepserve.engine.scheduling.admission import MINIMUM_RETRY_S, check_deadline, check_promises
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.forecast import CompletionEstimate, ForwardCost
from stepserve.engine.scheduling.lateness import (
    FIRST_SHARE,
    FORWARDS_AHEAD,
    MOST_SHARE,
    LatenessQuantile,
)
from stepserve.engine.tracks.track import Phase, Prediction

STEP_S = 0.012


class Exact(LatenessQuantile):
    """Of forecasts that are never wrong."""

    def safe_s(self, seconds: float, forward_s: float) -> float:
        return seconds


COST = ForwardCost(fixed_s=0.010, row_s=0.001, row_limit=2)


def demand(steps: int, kind: str = "a", started: bool = True, since_s: float = 0.0) -> Demand:
    return Demand(0, 2, steps, kind, 1, since_s, steps * STEP_S, steps * STEP_S, is_started=started)


def newcomer(steps: int) -> Demand:
    return demand(steps, started=False, since_s=9.0)


def estimate(*demands: Demand, row_limit: int = 2) -> CompletionEstimate:
    """One at a time with two rows; a forward takes 10 ms, and 1 ms a row."""
    cost = replace(COST, row_limit=row_limit)
    return CompletionEstimate(demands, lambda kind: cost)


def test_what_can_be_met_is_let_in() -> None:
    check_deadline(estimate(demand(10), newcomer(10)), Exact(), deadline_s=20.001 * STEP_S)


def test_what_cannot_is_refused_and_told_when_it_could() -> None:
    waiting = estimate(demand(1000), newcomer(100))
    with pytest.raises(UnmeetableDeadlineError) as refused:
        check_deadline(waiting, Exact(), deadline_s=2.0)
    error = refused.value
    assert error.message == ("cannot meet deadline_s=2: estimated 13.2 s under current load")
    assert error.expected_s == pytest.approx(1100 * STEP_S)
    assert error.retry_after_s == pytest.approx(1100 * STEP_S - 2.0)
    assert error.field == "deadline_s"


def test_what_takes_longer_even_alone_is_told_so() -> None:
    with pytest.raises(
        UnmeetableDeadlineError, match=r"estimated 1\.2 s even with no other requests"
    ) as refused:
        check_deadline(estimate(demand(1000), newcomer(100)), Exact(), deadline_s=1.0)
    assert refused.value.retry_after_s == math.inf


jobs = st.lists(
    st.builds(demand, st.integers(1, 80), st.sampled_from("ab"), st.booleans(), st.floats(0, 8)),
    max_size=8,
)


@given(jobs, st.integers(1, 50), st.floats(1.0, 3.0), st.sampled_from([2, 4, 8]))
def test_a_promise_holds_by_the_forecast_and_expected_s_could_be_promised(
    in_flight: list[Demand], steps: int, slack: float, row_limit: int
) -> None:
    beside = estimate(*in_flight, newcomer(steps), row_limit=row_limit)
    deadline_s = slack * beside.serial().finish_s[-1]
    if beside.finish_s[-1] <= deadline_s:
        check_deadline(beside, Exact(), deadline_s)
        return
    with pytest.raises(UnmeetableDeadlineError) as refused:
        check_deadline(beside, Exact(), deadline_s)
    assert refused.value.expected_s == beside.finish_s[-1]
    check_deadline(beside, Exact(), refused.value.expected_s)
    assert MINIMUM_RETRY_S <= refused.value.retry_after_s < math.inf


@given(jobs, st.integers(1, 50), st.sampled_from([2, 4, 8]))
def test_coming_later_is_coming_to_what_is_left(
    in_flight: list[Demand], steps: int, row_limit: int
) -> None:
    beside = estimate(*in_flight, newcomer(steps), row_limit=row_limit)
    assert beside.later_s(0.0) == pytest.approx(beside.finish_s[-1])
    assert beside.later_s(beside.finish_s[-1]) == pytest.approx(beside.serial().finish_s[-1])


def test_who_would_make_others_late_is_refused_until_those_are_done() -> None:
    """Two share each forward, so with the newcomer every step takes longer."""
    beside = estimate(demand(100), newcomer(50), row_limit=4)
    check_promises(beside, Exact(), [100 * 0.014])
    check_promises(beside, Exact(), [math.inf])
    with pytest.raises(ServerFullError, match="1 of those in flight could miss") as refused:
        check_promises(beside, Exact(), [100 * STEP_S])
    assert refused.value.retry_after_s == pytest.approx(100 * STEP_S)


def test_a_promise_that_is_broken_anyway_keeps_nobody_out() -> None:
    check_promises(estimate(demand(100), newcomer(50), row_limit=4), Exact(), [0.5])


@pytest.mark.parametrize("error", [UnmeetableDeadlineError("soon", 1.5, 3.5)])
def test_the_error_survives_pickling(error: UnmeetableDeadlineError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, UnmeetableDeadlineError)
    assert (copy.message, copy.retry_after_s, copy.expected_s) == ("soon", 1.5, 3.5)


def taught(latenesses: Sequence[float]) -> LatenessQuantile:
    margin = LatenessQuantile()
    for late in latenesses:
        scale_s = 1.0 + FORWARDS_AHEAD * 0.1
        margin.observe(Prediction(5.0, 1.0, 0.1), 6.0 + late * scale_s)
    return margin


def test_before_anything_was_seen_there_is_some_margin() -> None:
    assert LatenessQuantile().share == FIRST_SHARE
    assert taught([-0.5]).share == FIRST_SHARE
    assert LatenessQuantile().safe_s(1.0, 0.1) == pytest.approx(1.0 + FIRST_SHARE * 1.2)


def test_forecasts_that_are_never_late_need_none() -> None:
    assert taught([-0.01] * 300).share == 0.0


@given(st.lists(st.floats(-2, 3), max_size=400))
def test_the_margin_is_bounded(latenesses: list[float]) -> None:
    assert 0 <= taught(latenesses).share <= MOST_SHARE


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_margin_covers_98_of_100(seed: int) -> None:
    chance = random.Random(seed)
    latenesses = [chance.gauss(0.0, 0.1) for _ in range(5000)]
    margin, covered = taught(latenesses[:300]), 0
    for late in latenesses[300:]:
        covered += late <= margin.share
        margin.observe(Prediction(0.0, 1.0, 0.0), 1.0 + late)
    assert covered / 4700 >= 0.975


def test_the_margin_forgets_what_is_long_past() -> None:
    assert taught([0.5] * 300 + [0.05] * 256).share == pytest.approx(0.05)


class Bench:
    """An engine that is turned by hand, on a fake clock."""

    def __init__(self, max_rows: int = 32) -> None:
        self.modules = Modules(max_rows=max_rows)
        self.clock = self.modules.clock
        options = EngineOptions(max_rows=max_rows, max_pending_images=1000)
        self.engine = Engine(options, clock=self.clock)

    def submit(self, seed: int, steps: int, deadline_s: float | None = None) -> Ear:
        ear = Ear()
        track = job_track(self.modules, Job(seed, steps), ear)
        self.engine.submit(replace(track, deadline_s=deadline_s, clock=self.clock))
        return ear

    def run(self, turns: int = 10**6) -> None:
        """Until there is nothing to do."""
        for _ in range(turns):
            self.engine._take_commands(wait=False)
            if not self.engine.batcher.tick():
                return


@pytest.fixture
def bench() -> Bench:
    """It has learned what forwards of few and of many rows take."""
    bench = Bench()
    for seed in range(8):
        bench.submit(seed, 10 + 5 * seed)
    bench.run()
    return bench


def test_an_engine_that_learned_nothing_takes_any_deadline() -> None:
    ear = Bench().submit(1, 1000, deadline_s=0.1)
    assert ear.news == ["accepted"]


def test_an_engine_that_learned_refuses_what_it_cannot_do(bench: Bench) -> None:
    """Ten steps take 0.45 s."""
    with pytest.raises(UnmeetableDeadlineError, match=r"deadline_s=0\.3: "):
        bench.submit(2, 10, deadline_s=0.3)
    ear = bench.submit(3, 10, deadline_s=0.6)
    bench.run()
    assert ear.news == ["accepted", "started", "finished"]


def test_what_an_idle_engine_learned_long_ago_is_tried_anew(bench: Bench) -> None:
    """It may have been slow then, and if it refused everybody it would never know better."""
    bench.clock.advance(STALE_S)
    assert bench.submit(2, 10, deadline_s=0.3).news == ["accepted"]
    bench.run()
    with pytest.raises(UnmeetableDeadlineError):
        bench.submit(3, 10, deadline_s=0.3)


def test_however_long_ago_it_was_learned_what_nothing_can_do_is_refused(bench: Bench) -> None:
    bench.clock.advance(STALE_S)
    with pytest.raises(UnmeetableDeadlineError, match=r"deadline_s=0\.001: .* even with no other"):
        bench.submit(2, 10, deadline_s=0.001)


def test_idle_is_counted_from_when_work_was_last_in_flight(bench: Bench) -> None:
    """However long that work took."""
    before_s = bench.clock()
    bench.submit(2, 1000)
    bench.run()
    assert bench.clock() - before_s > STALE_S
    with pytest.raises(UnmeetableDeadlineError):
        bench.submit(3, 10, deadline_s=0.3)


def test_a_size_that_was_never_seen_is_tried(bench: Bench) -> None:
    track = job_track(bench.modules, Job(2, 10))
    other = (Phase(track.steps, "other"),)
    bench.engine.submit(replace(track, phases=other, deadline_s=0.3, clock=bench.clock))
    assert bench.engine.load().requests == 1


def submit_until_refused(bench: Bench) -> int:
    """How many without a deadline are let in before one is not."""
    for seed in range(3, 40):
        try:
            bench.submit(seed, 40)
        except ServerFullError:
            return seed - 3
    raise AssertionError("nobody was refused")


def test_those_without_deadline_break_no_promise(bench: Bench) -> None:
    """Thirty steps take 1.35 s alone: some company fits, not as much as anybody likes."""
    promised = bench.submit(2, 30, deadline_s=2.0)
    bench.run(3)
    accepted = submit_until_refused(bench)
    assert accepted > 2
    bench.run()
    assert promised.ends == ["finished"]
    assert promised.timings is not None
    assert promised.timings.total_s <= 2.0


def seconds_of(bench: Bench, deadline_s: float) -> float:
    """The least time of a few submissions, with 64 requests in flight."""
    times = []
    for number in range(20):
        started_s = time.perf_counter()
        with pytest.raises(UnmeetableDeadlineError):
            bench.submit(1000 + number, 20, deadline_s=deadline_s)
        times.append(time.perf_counter() - started_s)
    return min(times)


def test_deciding_takes_milliseconds_with_64_in_flight(bench: Bench) -> None:
    """A refusal takes longest: it also predicts when to come back. The bound is generous."""
    for seed in range(2, 66):
        bench.submit(seed, seed, deadline_s=1000)
    bench.run(5)
    assert len(bench.engine._in_flight) >= 60
    assert seconds_of(bench, deadline_s=1.5) < 0.010
