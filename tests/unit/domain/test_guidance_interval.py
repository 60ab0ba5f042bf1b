from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_limits import VALID


def guided(start: float, end: float, calls: int) -> list[int]:
    request = replace(VALID, guidance_start=start, guidance_end=end)
    return [call for call in range(calls) if request.is_guided(call, calls)]


@pytest.mark.parametrize(
    ("start", "end", "calls", "wanted"),
    [
        (0.0, 1.0, 3, [0, 1, 2]),
        (0.0, 0.6, 5, [0, 1, 2]),
        (0.6, 1.0, 5, [3, 4]),
        (0.2, 0.4, 5, [1]),
        (0.3, 0.7, 10, [3, 4, 5, 6]),
        (0.9, 1.0, 5, []),
        (0.0, 0.01, 5, [0]),
    ],
)
def test_the_interval_holds_its_start_and_not_its_end(
    start: float, end: float, calls: int, wanted: list[int]
):
    assert guided(start, end, calls) == wanted


@given(calls=st.integers(1, 60), cut=st.floats(0, 1))
def test_two_intervals_that_meet_are_one(calls: int, cut: float):
    assert guided(0, cut, calls) + guided(cut, 1, calls) == guided(0, 1, calls)
    assert guided(0, 1, calls) == list(range(calls))


def test_only_other_intervals_than_all_are_limits():
    assert not VALID.is_guidance_limited
    assert replace(VALID, guidance_start=0.1).is_guidance_limited
    assert replace(VALID, guidance_end=0.9).is_guidance_limited
