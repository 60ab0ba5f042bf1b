"""How many users there are at each moment of a load test. Pure."""

from __future__ import annotations

from collections.abc import Callable

CALM_SHARE = 0.2
CLIMB_SHARE = 0.1

Shape = Callable[[float], float]
"""From the share of the test that has passed to the share of users that are there."""


def ramp(passed: float) -> float:
    """More and more, evenly."""
    return passed


def steady(passed: float) -> float:
    """All of them, always."""
    return 1.0


def spike(passed: float) -> float:
    """A calm, all of them in the middle third, and a calm."""
    return 1.0 if 1 / 3 <= passed < 2 / 3 else CALM_SHARE


def soak(passed: float) -> float:
    """A short climb, then all of them for the rest of a long test."""
    return min(passed / CLIMB_SHARE, 1.0)


SHAPES: dict[str, Shape] = {"ramp": ramp, "steady": steady, "spike": spike, "soak": soak}


def users_at(shape: str, elapsed_s: float, run_time_s: float, most_users: int) -> int | None:
    """Users at one moment, at least one; None once the test is over."""
    if elapsed_s >= run_time_s:
        return None
    return max(round(most_users * SHAPES[shape](elapsed_s / run_time_s)), 1)
