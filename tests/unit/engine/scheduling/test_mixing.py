"""Lengths share a forward only where one for all costs less than one for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.scheduling.mixing import LEAST_SAVED, LengthRows, lengths_together

LIMIT = 32


def cost_s(length: int, rows: int, fixed_s: float = 0.010) -> float:
    """A row of a thousand tokens takes a millisecond."""
    return fixed_s + 1e-6 * length * rows


def rows_of(length: int, rows: int, fixed_s: float = 0.010, limit: int = LIMIT) -> LengthRows:
    return LengthRows(length, rows, limit, partial(cost_s, length, fixed_s=fixed_s))


def together(length: int, *waiting: LengthRows) -> set[int]:
    return set(lengths_together(waiting, length))


def test_one_length_goes_by_itself() -> None:
    assert together(1000, rows_of(1000, 2)) == {1000}
    assert together(1000, rows_of(1000, 99)) == {1000}


def test_lengths_go_together_where_filling_up_costs_less_than_a_forward() -> None:
    # Two rows are filled up by a thousand tokens each: 2 ms, instead of the 10 of a forward.
    assert together(1000, rows_of(1000, 2), rows_of(2000, 4)) == {1000, 2000}
    assert together(2000, rows_of(1000, 2), rows_of(2000, 4)) == {1000, 2000}
    # Twelve rows would take 12 ms longer.
    assert together(1000, rows_of(1000, 12), rows_of(2000, 4)) == {1000}
    assert together(2000, rows_of(1000, 12), rows_of(2000, 4)) == {2000}


def test_a_saving_within_the_error_of_costs_is_none() -> None:
    # It would be 0.2 ms of 110.
    waiting = rows_of(1000, 10, fixed_s=0.0102), rows_of(2000, 40, fixed_s=0.0102, limit=99)
    assert together(1000, *waiting) == {1000}


def test_where_everything_does_not_pay_the_nearest_do() -> None:
    waiting = rows_of(1000, 4), rows_of(1100, 4), rows_of(8000, 4)
    assert together(1000, *waiting) == {1000, 1100}
    assert together(8000, *waiting) == {8000}


def test_more_rows_than_a_forward_takes_are_not_mixed() -> None:
    waiting = rows_of(1000, 20, fixed_s=1.0), rows_of(1100, 20, fixed_s=1.0)
    assert together(1000, *waiting) == {1000}
    # The limit is that of the longest.
    few = rows_of(1000, 2), rows_of(2000, 2, limit=3)
    assert together(1000, *few) == {1000}


@st.composite
def lengths(draw: st.DrawFn) -> list[LengthRows]:
    """Some lengths, each with a line of its own: costs are learned, and may be anything."""
    known = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6, unique=True))
    return [
        LengthRows(
            length,
            draw(st.integers(1, 20)),
            draw(st.integers(1, 40)),
            partial(_line, draw(st.floats(1e-6, 1.0)), draw(st.floats(0.0, 0.1))),
        )
        for length in known
    ]


def _line(fixed_s: float, row_s: float, rows: int) -> float:
    return fixed_s + row_s * rows


def apart_s(parts: Sequence[LengthRows]) -> float:
    return sum(part.cost_s(part.rows) for part in parts)


def together_s(parts: Sequence[LengthRows]) -> float:
    return max(parts, key=lambda part: part.length).cost_s(sum(part.rows for part in parts))


@given(lengths(), st.integers(0, 5))
def test_mixing_never_costs_more_and_nothing_would_save_more(
    waiting: list[LengthRows], index: int
) -> None:
    first = waiting[index % len(waiting)].length
    chosen = lengths_together(waiting, first)
    parts = [part for part in waiting if part.length in chosen]
    assert first in chosen
    saved_s = apart_s(parts) - together_s(parts)
    if len(parts) > 1:
        assert saved_s >= LEAST_SAVED * together_s(parts)
        assert sum(part.rows for part in parts) <= max(parts, key=_length).row_limit
    ordered = sorted(waiting, key=_length)
    for start in range(len(ordered)):
        for end in range(start + 1, len(ordered) + 1):
            others = ordered[start:end]
            fits = sum(part.rows for part in others) <= others[-1].row_limit
            if first in map(_length, others) and fits:
                gain_s = apart_s(others) - together_s(others)
                assert gain_s <= max(saved_s, LEAST_SAVED * together_s(others)) + 1e-12


def _length(part: LengthRows) -> int:
    return part.length
