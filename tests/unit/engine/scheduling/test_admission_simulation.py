"""What admission promises, by simulation with forecasts that err: see `simulated_engine`."""

from __future__ import annotations

from functools import cache

import pytest
from simulated_engine import Score, SimulatedEngine, Traffic, capacity_per_s
from stepserve.domain.errors import ServerFullError, UnmeetableDeadlineError
from stepserve.engine.loop.engine import Engine
from stepserve.engine.scheduling.lateness import LatenessQuantile

SEEDS = (1, 2, 3)
WITHOUT_DEADLINE = 0.3


@cache
def capacity() -> float:
    return capacity_per_s()


@cache
def scores(load: float) -> tuple[Score, ...]:
    """At so many times what the engine can finish; nearly a third has no deadline."""
    traffic = [
        Traffic(load * capacity(), without_deadline=WITHOUT_DEADLINE, seed=seed) for seed in SEEDS
    ]
    return tuple(SimulatedEngine(item).run() for item in traffic)


def met_share(scores: tuple[Score, ...]) -> float:
    met = sum(len(score.met) for score in scores)
    return met / (met + sum(len(score.missed) for score in scores))


def goodput_per_s(load: float) -> float:
    return sum(score.goodput_per_s for score in scores(load)) / len(SEEDS)


@pytest.mark.parametrize("load", [1.0, 1.5, 2.0])
def test_what_is_let_in_meets_its_deadline(load: float) -> None:
    """Three times what a request takes alone, although others without deadline are let in too."""
    assert met_share(scores(load)) >= 0.98


def test_twice_the_load_leaves_the_goodput_as_it_was() -> None:
    assert goodput_per_s(2.0) >= 0.9 * goodput_per_s(1.0)


def test_a_server_that_refuses_is_a_busy_one() -> None:
    """It would be easy to keep all promises by making few."""
    assert goodput_per_s(1.0) >= 0.7 * capacity()
    assert goodput_per_s(2.0) >= 0.7 * capacity()


def test_refusals_say_when_to_come_back_and_what_could_be_promised() -> None:
    refused = [error for score in scores(1.5) for error in score.refused]
    own = [error for error in refused if isinstance(error, UnmeetableDeadlineError)]
    assert own
    assert any(isinstance(error, ServerFullError) for error in refused)
    assert all(error.retry_after_s >= 1 for error in refused)
    assert all(error.expected_s > 0 for error in own)


def test_without_foresight_next_to_nothing_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_check_deadlines", lambda *estimates: None)
    score = SimulatedEngine(Traffic(1.5 * capacity(), count=200)).run()
    assert score.met_share < 0.5


def test_without_the_margin_more_promises_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatenessQuantile, "safe_s", lambda self, seconds, forward_s: seconds)
    broken = [SimulatedEngine(Traffic(1.5 * capacity(), seed=seed)).run() for seed in SEEDS]
    assert met_share(tuple(broken)) < 0.98
