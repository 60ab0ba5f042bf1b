"""When requests should be finished, and how near the truth that is."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from engine_fakes import Bench, Denoiser, Ear, Job, Modules, job_work, make_work
from stepserve.engine.scheduling.forecast import Device, finish_times_s
from stepserve.engine.scheduling.forecast import Job as Expected
from stepserve.engine.tracks.track import Track


def device(max_active_rows: int = 32, limit: int = 32, max_group_rows: int = 32) -> Device:
    """A forward takes 10 ms, and 1 ms a row."""
    return Device(
        lambda shape, rows: 0.010 + 0.001 * rows,
        lambda shape: limit,
        max_group_rows,
        max_active_rows,
    )


def expected(steps: int, rows: int = 2, **changes: object) -> Expected:
    job = Expected("a", "a", rows, steps, 1, other_s=0.0, rank=0.0, started=True)
    return job._replace(**changes)  # type: ignore[arg-type]


def test_alone() -> None:
    assert finish_times_s([expected(10)], device()) == pytest.approx([10 * 0.012])
    assert finish_times_s([], device()) == []


def test_steps_get_shorter_as_others_leave() -> None:
    times = finish_times_s([expected(10), expected(4, rows=8)], device())
    assert times == pytest.approx([4 * 0.020 + 6 * 0.012, 4 * 0.020])


def test_two_groups_share_the_time() -> None:
    times = finish_times_s([expected(10), expected(5, group="b")], device())
    assert times == pytest.approx([2 * 5 * 0.012 + 5 * 0.012, 2 * 5 * 0.012])


def test_an_urgent_group_gets_eight_ninths() -> None:
    times = finish_times_s([expected(8), expected(8, group="b", priority=2)], device())
    assert times[0] == pytest.approx(8 * 0.012 * 9 / 8)
    assert times[1] == pytest.approx(16 * 0.012)


def test_queued_ones_start_by_rank_as_rows_get_free() -> None:
    jobs = [
        expected(10, rows=4),
        expected(5, rows=4, started=False, rank=2.0),
        expected(5, rows=4, started=False, rank=1.0),
    ]
    step_s = 0.014
    times = finish_times_s(jobs, device(max_active_rows=4))
    assert times == pytest.approx([10 * step_s, 20 * step_s, 15 * step_s])


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_queued_one_waits_for_rows_of_its_own_group_only(in_turns: bool) -> None:
    """Of the other group it starts at once, where the first group has no room left."""
    jobs = [
        expected(10, rows=4, serial_s=0.14, step_s=0.014),
        expected(5, rows=4, started=False, rank=1.0, serial_s=0.07, step_s=0.014),
        expected(2, group="b", rows=4, started=False, rank=2.0, serial_s=0.028, step_s=0.014),
    ]
    rows = replace(device(max_active_rows=8, max_group_rows=4), in_turns=in_turns)
    first, same, other = finish_times_s(jobs, rows)
    assert other < first < same
    narrow = replace(rows, max_active_rows=4)
    first, same, other = finish_times_s(jobs, narrow)
    assert first < same < other


def test_more_rows_than_one_forward_takes_need_several() -> None:
    times = finish_times_s([expected(10, rows=4), expected(10, rows=4)], device(limit=4))
    assert times == pytest.approx([20 * 0.014] * 2)


def test_time_apart_from_steps_is_spent_by_everyone() -> None:
    jobs = [expected(1, other_s=1.0), expected(2, other_s=1.0), expected(0, other_s=1.0)]
    times = finish_times_s(jobs, device())
    assert times == pytest.approx([1 + 1.014, 2 + 1.014 + 0.012, 1.0], abs=0.005)


WIDTHS = {"small": 4, "large": 16}


class WidthCosts(Denoiser):
    """A denoiser that takes as long as its samples are wide."""

    def spend(self, value: torch.Tensor) -> None:
        per_width_s = self.fixed_s + self.per_row_s * value.shape[0]
        self.clock.advance(per_width_s * value.shape[1] / 4)


def make_image(modules: Modules, width: int, rows: int, steps: int) -> torch.Tensor:
    """A pipeline call for an image of that width."""
    text = modules.encoder(torch.zeros(rows, 1))
    sample = torch.zeros(rows, width)
    for step in range(steps):
        sample = modules.denoiser(sample, torch.tensor(step), text=text)[0]
    return modules.decoder(sample)


@dataclass(frozen=True)
class Guess:
    """What was foretold for a request, and when it was submitted."""

    track: Track
    expected_s: float
    submitted_s: float


class TwoSizes:
    """Requests of two sizes, at random moments, on a fake clock."""

    def __init__(self, seed: int, per_s: float) -> None:
        self.bench = Bench()
        self.bench.modules.denoiser.__class__ = WidthCosts
        self.chance, self.per_s = random.Random(seed), per_s
        self.guesses: list[Guess] = []
        self.ended_s: dict[str, float] = {}

    def run(self, count: int) -> list[float]:
        """Relative errors of what was foretold, in the order of submission."""
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
        run = partial(make_image, self.bench.modules, WIDTHS[size], rows, steps)
        work = make_work(run, name=str(number), rows=rows, steps=steps)
        track = Track(replace(work, size=size), self.bench.clock)
        expected_s = self.bench.batcher.expected_finish_s(track)
        self.guesses.append(Guess(track, expected_s, self.bench.clock.now_s))
        self.bench.batcher.add(track)

    def error(self, guess: Guess) -> float:
        actual_s = self.ended_s[guess.track.work.id] - guess.submitted_s
        return abs(guess.expected_s - actual_s) / actual_s


@pytest.mark.parametrize("per_s", [0.6, 1.5, 3.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_finish_times_are_foretold_within_15_percent_once_warm(seed: int, per_s: float) -> None:
    """From a server that is often idle to one where requests queue up."""
    errors = TwoSizes(seed, per_s).run(200)[50:]
    assert statistics.median(errors) < 0.15


def test_a_lone_request_is_foretold_almost_exactly() -> None:
    bench = Bench()
    for seed in (1, 2, 3):
        ear = bench.add(Job(seed=seed, steps=10 * seed))
        bench.run()
    track = Track(job_work(bench.modules, Job(seed=4, steps=50)), bench.clock)
    expected_s = bench.batcher.expected_finish_s(track)
    ear = track.work.listener
    bench.batcher.add(track)
    bench.run()
    assert isinstance(ear, Ear)
    assert ear.timings is not None
    assert expected_s == pytest.approx(ear.timings.total_s, rel=0.01)
