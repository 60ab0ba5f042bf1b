from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.calls.call_key import CallShape
from stepserve.engine.scheduling.cost import CostModel

SHAPE = CallShape(("unet.forward", (4, 8, 8)))
measurements = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(0, 100, allow_subnormal=False)),
    min_size=1,
    max_size=40,
)


def learned(points: list[tuple[int, float]]) -> CostModel:
    model = CostModel()
    for rows, seconds in points:
        model.observe(SHAPE, rows, seconds)
    return model


@given(measurements, st.integers(1, 100_000))
def test_predictions_are_finite_and_positive(points: list[tuple[int, float]], rows: int) -> None:
    predicted = learned(points).predict(SHAPE, rows)
    assert math.isfinite(predicted)
    assert predicted > 0


@given(measurements, st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_rows_never_cost_less(points: list[tuple[int, float]], one: int, other: int) -> None:
    model = learned(points)
    fewer, more = sorted((one, other))
    assert model.predict(SHAPE, fewer) <= model.predict(SHAPE, more)


def test_a_line_is_learned_and_continued_beyond_what_was_seen() -> None:
    model = learned([(rows, 0.010 + 0.003 * rows) for rows in (2, 4, 8, 16) for _ in range(5)])
    for rows in (1, 2, 6, 16, 32, 64):
        assert model.predict(SHAPE, rows) == pytest.approx(0.010 + 0.003 * rows, rel=1e-6)


def test_from_one_row_count_alone_cost_grows_in_proportion_and_does_not_shrink() -> None:
    model = learned([(4, 0.020)] * 3)
    assert model.predict(SHAPE, 4) == pytest.approx(0.020)
    assert model.predict(SHAPE, 8) == pytest.approx(0.040)
    assert model.predict(SHAPE, 1) == pytest.approx(0.020)


def test_it_follows_a_machine_that_gets_slower() -> None:
    model = learned([(4, 0.020)] * 50 + [(4, 0.060)] * 300)
    assert model.predict(SHAPE, 4) == pytest.approx(0.060, rel=0.01)


def test_what_is_no_measurement_is_left_out() -> None:
    model = learned([(4, 0.020)])
    for rows, seconds in ((4, math.nan), (4, math.inf), (4, -1.0), (0, 0.5)):
        model.observe(SHAPE, rows, seconds)
    assert model.predict(SHAPE, 4) == pytest.approx(0.020)


def test_a_shape_never_seen_gets_a_guess() -> None:
    model = CostModel(unknown_s=0.7)
    assert not model.knows(SHAPE)
    assert model.predict(SHAPE, 3) == 0.7
    model.observe(SHAPE, 3, 0.1)
    assert model.knows(SHAPE)
    assert model.predict(CallShape(("other",)), 3) == 0.7


def of_length(length: int) -> CallShape:
    return CallShape(("transformer.forward",), length)


def by_tokens(rows: int, length: int) -> float:
    return 0.010 + 0.000_002 * rows * length


def learned_of_lengths(*points: tuple[int, int]) -> CostModel:
    """From forwards of so many rows of so many tokens."""
    model = CostModel()
    for rows, length in points:
        for _ in range(5):
            model.observe(of_length(length), rows, by_tokens(rows, length))
    return model


def test_a_length_never_seen_costs_what_its_tokens_do() -> None:
    model = learned_of_lengths((2, 1024), (8, 1024), (4, 2048))
    assert not model.knows(of_length(512))
    for rows, length in ((1, 512), (16, 512), (4, 4096)):
        expected_s = by_tokens(rows, length)
        assert model.predict(of_length(length), rows) == pytest.approx(expected_s, rel=0.01)


def test_what_is_fixed_is_learned_from_all_lengths() -> None:
    """Of each length one row count was seen: by itself none tells what more rows would cost."""
    model = learned_of_lengths((2, 1024), (2, 4096))
    for length in (1024, 4096):
        assert model.predict(of_length(length), 8) == pytest.approx(by_tokens(8, length), rel=0.01)


def test_a_length_that_is_slower_than_its_tokens_say_is_told_as_it_was_seen() -> None:
    model = learned_of_lengths((2, 1024), (8, 1024), (4, 2048))
    slow = of_length(4096)
    model.observe(slow, 2, 0.080)
    assert model.predict(slow, 2) == pytest.approx(0.080)
    assert 0.080 < model.predict(slow, 4) < 0.160
    # Two row counts tell all.
    for _ in range(50):
        model.observe(slow, 2, 0.080)
        model.observe(slow, 4, 0.120)
    assert model.predict(slow, 8) == pytest.approx(0.200, rel=0.01)


lengths = st.integers(1, 10_000)


@given(st.lists(st.tuples(st.integers(1, 64), lengths, st.floats(0, 100)), max_size=30), lengths)
def test_predictions_for_lengths_are_positive_and_grow_with_rows(
    points: list[tuple[int, int, float]], length: int
) -> None:
    model = CostModel()
    for rows, known, seconds in points:
        model.observe(of_length(known), rows, seconds)
    for shape in (of_length(length), *(of_length(known) for _, known, _ in points)):
        predicted = [model.predict(shape, rows) for rows in (1, 2, 5, 64, 10_000)]
        assert predicted == sorted(predicted)
        assert 0 < predicted[0] <= predicted[-1] < math.inf
