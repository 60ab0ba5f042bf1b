from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.step_cache import FIRST_STEPS
from stepserve.pipelines.step_cache.schedule import MOST_IN_A_ROW, skipped_calls

BEGINS = st.floats(0, 1)
MAGNITUDES = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)
CALLS = st.integers(0, 120)
THRESHOLDS = st.floats(0.001, 1)


@given(MAGNITUDES, CALLS, THRESHOLDS, BEGINS)
def test_the_first_calls_and_the_last_one_always_run(
    magnitudes: list[float], calls: int, threshold: float, begin: float
) -> None:
    skipped = skipped_calls(magnitudes, calls, threshold, begin)
    assert skipped <= set(range(FIRST_STEPS, calls - 1))


@given(MAGNITUDES, CALLS, THRESHOLDS)
def test_only_so_many_are_skipped_in_a_row(
    magnitudes: list[float], calls: int, threshold: float
) -> None:
    skipped = skipped_calls(magnitudes, calls, threshold)
    runs = groupby(range(calls), key=skipped.__contains__)
    assert all(len(list(run)) <= MOST_IN_A_ROW for is_skipped, run in runs if is_skipped)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=60), THRESHOLDS)
def test_the_errors_of_what_is_skipped_in_a_row_stay_below_the_threshold(
    magnitudes: list[float], threshold: float
) -> None:
    skipped = skipped_calls(magnitudes, len(magnitudes), threshold)
    last_run, error = 0, 0.0
    for call, magnitude in enumerate(magnitudes):
        if call in skipped:
            error += abs(1 - magnitude / magnitudes[last_run])
            assert error < threshold * (1 + 1e-6)
        else:
            last_run, error = call, 0.0


@given(st.floats(0.01, 100), st.integers(5, 120), THRESHOLDS)
def test_steady_magnitudes_skip_as_many_as_may_be(
    magnitude: float, calls: int, threshold: float
) -> None:
    skipped = skipped_calls([magnitude] * 7, calls, threshold)
    period = MOST_IN_A_ROW + 1
    runs = {call for call in range(calls) if (call - FIRST_STEPS + 1) % period == 0}
    assert skipped == set(range(FIRST_STEPS, calls - 1)) - runs


@given(MAGNITUDES, CALLS, THRESHOLDS)
def test_only_how_magnitudes_change_matters(
    magnitudes: list[float], calls: int, threshold: float
) -> None:
    doubled = [2 * magnitude for magnitude in magnitudes]
    assert skipped_calls(doubled, calls, threshold) == skipped_calls(magnitudes, calls, threshold)


def test_a_magnitude_that_changes_too_much_skips_nothing() -> None:
    assert skipped_calls([2.0**call for call in range(20)], 20, threshold=0.5) == frozenset()


def test_what_changes_fast_at_the_end_is_run_there() -> None:
    magnitudes = [1.0] * 10 + [1.5**call for call in range(1, 11)]
    assert skipped_calls(magnitudes, 20, threshold=0.1) == {3, 4, 5, 7, 8, 9}


def test_errors_add_up_over_the_calls_skipped_in_a_row() -> None:
    # 0.04 is below the threshold, and so would 0.08 be; their sum is not.
    magnitudes = [1.0] * 3 + [1.0 + 0.04 * call for call in range(1, 5)]
    assert skipped_calls(magnitudes, len(magnitudes), threshold=0.1) == {3, 5}


@pytest.mark.parametrize("calls", [25, 50, 100])
def test_magnitudes_are_read_by_how_far_a_request_has_come(calls: int) -> None:
    """What was measured as steady in the second half is so at any number of calls."""
    magnitudes = [2.0 ** (25 - call) for call in range(25)] + [1.0] * 25
    skipped = skipped_calls(magnitudes, calls, threshold=0.1)
    assert skipped
    assert min(skipped) >= calls // 2


@pytest.mark.parametrize("begin", [0.5, 0.75])
def test_a_request_that_begins_on_the_way_has_the_magnitudes_from_there(begin: float) -> None:
    """Steady up to the half, and then no more."""
    magnitudes = [1.0] * 51 + [2.0**call for call in range(1, 51)]

    assert skipped_calls(magnitudes, 26, threshold=0.1) != frozenset()
    assert skipped_calls(magnitudes, 26, 0.1, begin) == frozenset()
