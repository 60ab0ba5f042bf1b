"""What the policy is for, in numbers, by simulation with the forward times that were measured."""

from __future__ import annotations

import pytest
from stepserve.engine.scheduling.policy import SHORTEST_FIRST, Policy

from loadtests.policies import DUE_TIME, STRICT_FIFO
from loadtests.policy_simulation import (
    MEASURED_S,
    STEPS,
    Mix,
    Simulation,
    at_rate,
    forward_s,
    goodput_knee,
    latencies,
    one_at_a_time,
    rate_alone,
)

TWO_SIZES = Mix({"small": 0.7, "large": 0.3}, STEPS)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_sizes_at_once_twice_the_goodput_of_strict_fifo(seed: int) -> None:
    fifo, due, shortest = (
        goodput_knee(policy, TWO_SIZES, count=500, seed=seed)
        for policy in (STRICT_FIFO, DUE_TIME, SHORTEST_FIRST)
    )
    assert due >= 2 * fifo
    assert shortest >= 1.2 * due


@pytest.mark.parametrize("policy", [SHORTEST_FIRST, DUE_TIME])
def test_short_requests_do_not_wait_for_long_ones_and_those_are_no_later(policy: Policy) -> None:
    drawn = Mix({"small": 1.0}, {4: 0.5, 50: 0.5}).draw(1000, seed=3)
    requests = at_rate(drawn, rate_alone(drawn, load=0.8))
    shared, alone = Simulation(policy).run(requests), one_at_a_time(requests)
    short, short_alone = (latencies(requests, times, steps=4) for times in (shared, alone))
    assert short_alone.mean_s >= 5 * short.mean_s
    long, long_alone = (latencies(requests, times, steps=50) for times in (shared, alone))
    assert long.p99_s <= long_alone.p99_s


def test_a_request_alone_takes_its_own_time() -> None:
    (request,) = Mix({"large": 1.0}, {10: 1.0}).draw(1, seed=0)
    (seconds,) = Simulation(SHORTEST_FIRST).run([request])
    assert seconds == pytest.approx(request.serial_s)
    assert request.serial_s == pytest.approx(10 * 4 * MEASURED_S[2])


def test_forward_times_are_those_measured_and_lines_between() -> None:
    for rows in (2, 8, 16, 32):
        assert forward_s("small", rows) == pytest.approx(MEASURED_S[rows])
    assert forward_s("small", 12) == pytest.approx((MEASURED_S[8] + MEASURED_S[16]) / 2)
    assert forward_s("small", 64) == pytest.approx(0.104 + 2 * 0.050)
