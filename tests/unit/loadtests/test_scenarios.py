"""What is done to a server, as far as it can be told without one."""

from __future__ import annotations

import pytest

from loadtests.load.scenarios import LEAST_KNEE_RUN_S, long_enough
from loadtests.load.trace import arrivals_at, draw_gaps


@pytest.mark.parametrize("rate_per_s", [0.3, 2.0, 9.0])
def test_a_rate_that_is_too_high_is_kept_up_until_it_shows(rate_per_s: float) -> None:
    count = long_enough(64, rate_per_s)
    assert count >= 64
    arrivals = arrivals_at(rate_per_s, draw_gaps(count, seed=0))
    assert arrivals[-1] > 0.8 * LEAST_KNEE_RUN_S
