"""The policy against what others do, on a simulated fleet."""

from __future__ import annotations

import pytest

from loadtests.routing.compare import BASELINES, CAPACITY, POLICY, capacity, compare

LOAD = 0.85


@pytest.mark.parametrize(
    ("replicas", "routers"), [(8, 1), pytest.param(24, 3, marks=pytest.mark.slow)]
)
def test_p95_is_a_quarter_under_the_best_of_the_others(replicas: int, routers: int) -> None:
    results = compare(replicas, routers, LOAD, seconds=60, seed=1)
    best = min(results[name].p95_s for name in BASELINES)
    assert results[POLICY].p95_s <= 0.75 * best
    assert results[POLICY].mean_s <= min(results[name].mean_s for name in BASELINES)


def test_a_thousand_replicas_are_simulated_and_served_better() -> None:
    results = compare(1000, 2, LOAD, seconds=3, seed=2, policies=("least requests", POLICY))
    assert results[POLICY].p95_s < results["least requests"].p95_s


def test_the_same_seed_is_the_same_simulation() -> None:
    once, again = (compare(4, 1, LOAD, seconds=10, seed=3, policies=(POLICY,)) for _ in range(2))
    assert once == again


def test_a_slow_replica_makes_it_clearer() -> None:
    speeds = [1.0] * 7 + [0.4]
    results = compare(8, 1, 0.7, seconds=60, seed=1, speeds=speeds)
    best = min(results[name].p95_s for name in BASELINES)
    assert results[POLICY].p95_s <= 0.75 * best


def test_the_load_is_told_in_shares_of_what_is_measured() -> None:
    assert capacity("least requests") == pytest.approx(CAPACITY, rel=0.05)
    assert capacity(POLICY) >= CAPACITY
