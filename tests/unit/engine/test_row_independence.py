from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.engine.call import Call, ParkableMethod, make_call
from service.engine.row_independence import companies, rows_are_independent, same_bits

LAST_BIT = 2**-23


def calls_of(forward: Any, rows: tuple[int, ...] = (2, 2, 1, 1)) -> list[Call]:
    method = ParkableMethod("unet", "forward", forward)
    generator = torch.Generator().manual_seed(0)
    return [make_call(method, (torch.rand(r, 3, generator=generator),), {}) for r in rows]


def steady(sample: Tensor) -> tuple[Tensor]:
    return (sample + 1,)


def rounds_by_row_count(sample: Tensor) -> tuple[Tensor]:
    """Like kernels that sum in another order for another row count."""
    return (sample + 1 + (LAST_BIT if sample.shape[0] > 4 else 0),)


def rounds_by_position(sample: Tensor) -> tuple[Tensor]:
    noise = torch.zeros_like(sample)
    noise[-1] = LAST_BIT
    return (sample + 1 + noise,)


def leaks_to_neighbours(sample: Tensor) -> tuple[Tensor]:
    return (sample + sample.sum() * 1e-3,)


def test_rows_that_only_depend_on_themselves_are_independent() -> None:
    assert rows_are_independent(calls_of(steady), max_rows=32)
    assert rows_are_independent(calls_of(steady), max_rows=8, bucket_rows=8)


@pytest.mark.parametrize("forward", [rounds_by_row_count, rounds_by_position, leaks_to_neighbours])
def test_a_last_bit_that_depends_on_others_is_seen(forward: Any) -> None:
    assert not rows_are_independent(calls_of(forward), max_rows=32)


def test_forwards_of_one_row_count_can_make_rows_independent() -> None:
    assert rows_are_independent(calls_of(rounds_by_row_count), max_rows=8, bucket_rows=8)
    assert not rows_are_independent(calls_of(leaks_to_neighbours), max_rows=8, bucket_rows=8)


@given(rows=st.lists(st.integers(1, 3), min_size=1, max_size=5), max_rows=st.integers(6, 64))
def test_companies_fit_and_grow_to_the_limit(rows: list[int], max_rows: int) -> None:
    tried = list(companies(rows, max_rows))
    sums = [sum(rows[index] for index in company) for company in tried]
    assert all(total <= max_rows for total in sums)
    assert max(sums) > max_rows / 3
    assert all(0 <= index < len(rows) for company in tried for index in company)


def test_every_call_meets_others_and_stands_at_several_places() -> None:
    tried = list(companies([2, 2, 1, 1], 32))
    for call in range(4):
        assert {company.index(call) for company in tried if call in company} - {0}


def test_bits_are_compared_in_all_tensors() -> None:
    one = {"sample": torch.ones(2), "states": (torch.zeros(1),)}
    other = {"sample": torch.ones(2), "states": (torch.zeros(1) + 1e-9,)}
    assert same_bits(one, one)
    assert not same_bits(one, other)
