"""When requests should be finished, and how near the truth that is."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from engine_fakes import Bench, Denoiser, Ear, Job, Modules, job_track, make_track
from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.forecast import (
    CompletionEstimate,
    ForwardCost,
    finish_times_s,
)
from stepserve.engine.tracks.track import Phase, Track

COST = ForwardCost(fixed_s=0.010, row_s=0.001, row_limit=32)


def demand(steps: int, rows: int = 2, **changes: Any) -> Demand:
    """A forward takes 10 ms, and 1 ms a row."""
    step_s = COST.forward_s(rows)
    serial_s = steps * step_s
    return Demand(
        0, rows, steps, "a", left_s=serial_s, serial_s=serial_s, is_started=True
    )._replace(**changes)


def finish_s(*demands: Demand, cost: ForwardCost = COST, other_row_s: float = 0.0) -> list[float]:
    return list(finish_times_s(demands, lambda kind: cost, other_row_s))


def test_serial() -> None:
    assert finish_s(demand(10)) == pytest.approx([10 * 0.012])
    assert finish_s() == []


def test_requests_of_a_kind_step_together() -> None:
    times = finish_s(demand(10), demand(4, rows=8))
    assert times == pytest.approx([10 * 0.010 + 10 * 0.002 + 4 * 0.008, 4 * 0.020])


def test_of_two_kinds_the_shorter_goes_first() -> None:
    times = finish_s(demand(10), demand(5, kind="b"))
    assert times == pytest.approx([15 * 0.012, 5 * 0.012])


def test_the_urgent_go_first() -> None:
    times = finish_s(demand(8), demand(8, kind="b", priority=0))
    assert times == pytest.approx([16 * 0.012, 8 * 0.012])


def test_what_others_have_done_already_counts_for_what_is_left_only() -> None:
    """A long request that is nearly done goes before a short one that has just come."""
    nearly_done = demand(1)._replace(serial_s=50 * 0.012)
    times = finish_s(nearly_done, demand(10, kind="b"))
    assert times == pytest.approx([0.012, 11 * 0.012])


def test_more_rows_than_one_forward_takes_need_several() -> None:
    narrow = replace(COST, row_limit=4)
    times = finish_s(demand(10, rows=4), demand(10, rows=4), cost=narrow)
    assert times == pytest.approx([20 * 0.014] * 2)


def test_queued_ones_start_in_the_order_they_are_due_as_rows_get_free() -> None:
    narrow = replace(COST, row_limit=4)
    queued = [
        demand(5, rows=4, is_started=False, submitted_s=submitted_s) for submitted_s in (2.0, 1.0)
    ]
    times = finish_s(demand(10, rows=4), *queued, cost=narrow)
    assert times == pytest.approx([10 * 0.014, 20 * 0.014, 15 * 0.014])


def test_a_queued_one_waits_for_rows_of_its_own_kind_only() -> None:
    narrow = replace(COST, row_limit=4)
    same = demand(5, rows=4, is_started=False)
    first, same_s, other_s = finish_s(
        demand(10, rows=4), same, demand(4, kind="b", is_started=False), cost=narrow
    )
    assert other_s < first < same_s


def test_the_urgent_take_the_rows_of_others() -> None:
    narrow = replace(COST, row_limit=4)
    urgent = demand(5, rows=4, is_started=False, priority=0)
    assert finish_s(demand(10, rows=4), urgent, cost=narrow)[1] == pytest.approx(5 * 0.014, rel=1)


def test_time_apart_from_steps_is_spent_by_everyone() -> None:
    times = finish_s(demand(1), demand(2), demand(0), other_row_s=0.5)
    assert times == pytest.approx([2 + 0.014, 3 + 0.014 + 0.012, 1.0])


demands = st.lists(
    st.builds(
        demand,
        st.integers(0, 60),
        st.integers(1, 8),
        kind=st.sampled_from("abc"),
        priority=st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)


@given(demands)
def test_nobody_ends_before_its_own_steps_and_one_more_makes_nobody_sooner(
    demands: list[Demand],
) -> None:
    *others, newcomer = demands
    estimate = CompletionEstimate(demands, lambda kind: COST)
    for item, seconds in zip(demands, estimate.finish_s, strict=True):
        assert seconds >= item.left_s - 1e-9
    pairs = zip(estimate.without_s(), estimate.finish_s, strict=False)
    assert all(without_s <= with_s + 1e-9 for without_s, with_s in pairs)
    assert estimate.serial().finish_s == pytest.approx((newcomer.left_s,))
    assert len(estimate.without_s()) == len(others)


WIDTHS = {"small": 4, "large": 16}


class WidthCosts(Denoiser):
    """A denoiser that takes as long as its samples are wide."""

    def spend(self, value: torch.Tensor) -> None:
        per_width_s = self.fixed_s + self.per_row_s * value.shape[0]
        self.clock.advance(per_width_s * value.shape[1] / 4)


def make_image(modules: Modules, rows: int, phases: tuple[Phase, ...]) -> torch.Tensor:
    """A pipeline call for an image of each phase's width, one after the other."""
    for phase in phases:
        text = modules.encoder(torch.zeros(rows, 1))
        sample = torch.zeros(rows, WIDTHS[str(phase.size)])
        for step in range(phase.steps):
            sample = modules.denoiser(sample, torch.tensor(step), text=text)[0]
        made = modules.decoder(sample)
    return made


def sized_track(bench: Bench, phases: tuple[Phase, ...], rows: int, name: str) -> Track:
    run = partial(make_image, bench.modules, rows, phases)
    track = make_track(run, name=name, rows=rows)
    return replace(track, phases=phases, clock=bench.clock)


@dataclass(frozen=True)
class Guess:
    """What was predicted for a request, and when it was submitted."""

    track: Track
    expected_s: float
    submitted_s: float


class TwoSizes:
    """Requests of two sizes, at random moments, on a fake clock.

    Args:
        enlarged: the share of those that draw a small one first, and then a large one of that.
    """

    def __init__(self, seed: int, per_s: float, enlarged: float = 0.0) -> None:
        self.enlarged = enlarged
        self.bench = Bench()
        self.bench.modules.denoiser.__class__ = WidthCosts
        self.chance, self.per_s = random.Random(seed), per_s
        self.guesses: list[Guess] = []
        self.ended_s: dict[str, float] = {}

    def run(self, count: int) -> list[float]:
        """Relative errors of what was predicted, in the order of submission."""
        next_s = self.bench.clock.now_s
        while len(self.ended_s) < count:
            while len(self.guesses) < count and self.bench.clock.now_s >= next_s:
                self.submit(len(self.guesses), next_s)
                next_s += self.chance.expovariate(self.per_s)
            if not self.bench.batcher.tick():
                self.bench.clock.now_s = max(self.bench.clock.now_s, next_s)
            for name in self.bench.ended[len(self.ended_s) :]:
                self.ended_s[name] = self.bench.clock.now_s
        return [self.error(guess) for guess in self.guesses]

    def submit(self, number: int, now_s: float) -> None:
        size = self.chance.choices(["small", "large"], weights=[0.7, 0.3])[0]
        steps = self.chance.choices([4, 10, 20, 50], weights=[0.25, 0.25, 0.35, 0.15])[0]
        rows = self.chance.choice([1, 2, 2, 2, 4])
        phases: tuple[Phase, ...] = (Phase(steps, size),)
        if self.chance.random() < self.enlarged:
            phases = Phase(steps, "small"), Phase(max(steps // 2, 1), "large")
        track = sized_track(self.bench, phases, rows, str(number))
        bench = self.bench
        expected_s = bench.estimator.stretched_s(track, bench.finish_times_s(track)[-1])
        self.guesses.append(Guess(track, expected_s, self.bench.clock.now_s))
        self.bench.batcher.scheduler.add(track)

    def error(self, guess: Guess) -> float:
        actual_s = self.ended_s[guess.track.id] - guess.submitted_s
        return abs(guess.expected_s - actual_s) / actual_s


@pytest.mark.parametrize(("per_s", "bound"), [(0.6, 0.15), (1.5, 0.15), (3.0, 0.25)])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_median_error_of_predicted_finish_times_is_small_once_warm(
    seed: int, per_s: float, bound: float
) -> None:
    """From a server that is often idle to one where requests queue up."""
    errors = TwoSizes(seed, per_s).run(200)[50:]
    assert statistics.median(errors) < bound


@pytest.mark.parametrize(("per_s", "bound"), [(0.4, 0.15), (1.5, 0.25)])
def test_requests_that_go_on_at_another_size_are_predicted_as_well(
    per_s: float, bound: float
) -> None:
    errors = TwoSizes(1, per_s, enlarged=0.4).run(200)[50:]
    assert statistics.median(errors) < bound


def test_a_request_of_two_sizes_is_counted_at_both() -> None:
    bench = Bench()
    bench.modules.denoiser.__class__ = WidthCosts
    for name, size in enumerate(("small", "large")):
        for rows in (1, 2):
            track = sized_track(bench, (Phase(8, size),), rows, f"{name}{rows}")
            bench.batcher.scheduler.add(track)
            bench.run()
    both = sized_track(bench, (Phase(10, "small"), Phase(6, "large")), 2, "both")
    small_s, large_s = 0.044, 4 * 0.044
    before = bench.estimator.demand(both)
    assert (before.steps, before.later) == (10, ((6, both.kind_of("large")),))
    assert before.serial_s == before.left_s == pytest.approx(10 * small_s + 6 * large_s, rel=0.02)
    expected_s = bench.finish_times_s(both)[-1]
    began_s = bench.clock.now_s
    bench.batcher.scheduler.add(both)
    while both.steps_done < 12:
        bench.batcher.tick()
    after = bench.estimator.demand(both)
    assert (after.steps, after.later, after.kind) == (4, (), both.kind_of("large"))
    assert after.left_s == pytest.approx(4 * large_s, rel=0.02)
    bench.run()
    assert expected_s == pytest.approx(bench.clock.now_s - began_s, rel=0.05)


def test_one_of_two_kinds_is_done_when_its_last_kind_is() -> None:
    later = ((5, "b"),)
    both = demand(10, later=later, left_s=15 * 0.012, serial_s=15 * 0.012)
    # Steps of its first kind are shared with another of that kind, which is shorter.
    times = finish_s(both, demand(4))
    assert times == pytest.approx([10 * 0.012 + 4 * 0.002 + 5 * 0.012, 4 * 0.014])
    # One that has more to do waits for both kinds.
    assert finish_s(both, demand(20, kind="c"))[1] == pytest.approx(35 * 0.012)


def test_a_lone_request_is_predicted_almost_exactly() -> None:
    bench = Bench()
    for seed in (1, 2, 3):
        ear = bench.add(Job(seed=seed, steps=10 * seed))
        bench.run()
    track = replace(job_track(bench.modules, Job(seed=4, steps=50)), clock=bench.clock)
    expected_s = bench.finish_times_s(track)[-1]
    listener = track.listener
    bench.batcher.scheduler.add(track)
    bench.run()
    assert isinstance(listener, Ear)
    ear = listener
    assert ear.timings is not None
    assert expected_s == pytest.approx(ear.timings.total_s, rel=0.01)
