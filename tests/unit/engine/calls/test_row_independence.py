from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.batch_invariance import (
    VECTOR_NUMBERS,
    agreeing_row_counts,
    groups_of,
    independent_rows,
    one_row,
    row_counts,
    same_bits,
    varied,
    vector_layer_calls,
)
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.engine.calls.stacking import stack
from torch import Tensor, nn

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
    assert independent_rows(calls_of(steady), max_rows=33) == 33
    assert agreeing_row_counts(calls_of(steady), (8, 2, 5)) == (8, 2, 5)


@pytest.mark.parametrize("forward", [rounds_by_position, leaks_to_neighbours])
def test_a_last_bit_that_depends_on_others_is_seen(forward: Any) -> None:
    assert independent_rows(calls_of(forward, rows=(1, 2, 1)), max_rows=32) == 1
    assert agreeing_row_counts(calls_of(forward), (8, 4)) == ()


def test_rows_may_be_independent_up_to_some_row_count() -> None:
    assert independent_rows(calls_of(rounds_by_row_count), max_rows=32) == 4


def test_forwards_of_one_row_count_can_make_rows_independent() -> None:
    assert agreeing_row_counts(calls_of(rounds_by_row_count), (8,)) == (8,)


def test_some_row_counts_may_agree_with_one_another() -> None:
    calls = calls_of(rounds_by_row_count)
    assert agreeing_row_counts(calls, (8, 4, 12, 2)) == (8, 12)
    assert agreeing_row_counts(calls, (4, 8, 2)) == (4, 2)


def test_one_row_is_the_first_of_everything_that_has_rows() -> None:
    rules = ArgumentRules(
        repeated=frozenset({"frames"}),
        layered=frozenset({"states"}),
        row_lists=frozenset({"shapes"}),
        shared=frozenset({"table"}),
    )
    parameters = ("sample", "timestep", "frames", "states", "shapes", "table", "more")
    method = ParkableMethod("unet", "forward", steady, parameters=parameters, rules=rules)
    call = make_call(
        method,
        (torch.arange(6.0).reshape(3, 2), torch.tensor([7, 8, 9])),
        {
            "frames": torch.arange(6.0).reshape(6, 1),
            "states": torch.arange(6.0).reshape(2, 3),
            "shapes": [(1, 2), (3, 4), (5, 6)],
            "table": torch.arange(3.0),
            "more": {"scale": 0.5, "hidden": (torch.arange(3.0).reshape(3, 1), None)},
        },
    )
    first = one_row(call)
    assert (call.rows, first.rows, first.key) == (3, 1, call.key)
    sample, timestep = first.args
    assert (sample.tolist(), timestep.tolist()) == ([[0.0, 1.0]], [7])
    given = first.kwargs
    assert given["frames"].tolist() == [[0.0], [1.0]]
    assert given["states"].tolist() == [[0.0], [3.0]]
    assert given["shapes"] == [(1, 2)]
    assert given["table"].tolist() == [0.0, 1.0, 2.0]
    assert given["more"]["scale"] == 0.5
    assert given["more"]["hidden"][0].tolist() == [[0.0]]
    args, kwargs = stack([first, first], 3)
    assert args[0].tolist() == [[0.0, 1.0]] * 3
    assert kwargs["shapes"] == [(1, 2)] * 3


def test_a_single_row_is_always_alone() -> None:
    assert independent_rows(calls_of(leaks_to_neighbours), max_rows=1) == 1


@given(rows=st.lists(st.integers(1, 3), min_size=1, max_size=9), count=st.integers(3, 64))
def test_each_call_takes_part_in_forwards_as_large_as_can_be(rows: list[int], count: int) -> None:
    tried = list(groups_of(rows, count))
    sums = [sum(rows[index] for index in group) for group in tried]
    assert all(count - min(rows) < total <= count for total in sums)
    assert {index for group in tried for index in group} == set(range(len(rows)))


@given(max_rows=st.integers(1, 300))
def test_row_counts_grow_to_the_limit_in_small_steps(max_rows: int) -> None:
    counts = row_counts(max_rows)
    assert counts == sorted(set(counts))
    assert counts[-1:] == [max_rows][: max_rows - 1]
    assert all(later <= 1.5 * count for count, later in pairwise(counts))


def test_every_call_meets_others_and_stands_at_several_places() -> None:
    tried = [group for count in row_counts(32) for group in groups_of([2, 2, 1, 1], count)]
    for call in range(4):
        assert len({group.index(call) for group in tried if call in group}) > 1


def test_layers_with_one_vector_a_row_are_found_and_tried_with_many_rows() -> None:
    embed, mix = nn.Linear(3, 512), nn.Linear(512, 4)

    def forward(sample: Tensor, timestep: Tensor) -> Tensor:
        return mix(embed(timestep.reshape(-1, 1) * sample[:, 0]).unsqueeze(1) * sample[:, :1, :1])

    method = ParkableMethod("unet", "forward", forward)
    call = make_call(method, (torch.ones(2, 5, 3), torch.ones(2)), {})
    kinds = vector_layer_calls(call, least=64, generator=torch.Generator().manual_seed(0))
    assert [len(calls) for calls in kinds] == [VECTOR_NUMBERS // 512, VECTOR_NUMBERS // 4]
    assert all(len({c.key for c in calls}) == 1 and calls[0].rows == 1 for calls in kinds)


def test_a_layer_that_gets_several_vectors_a_row_is_not_one_of_them() -> None:
    layer = nn.Linear(3, 512)
    call = make_call(ParkableMethod("unet", "forward", layer.forward), (torch.ones(2, 5, 3),), {})
    assert vector_layer_calls(call, 64, torch.Generator()) == []


def test_a_varied_call_could_share_a_forward_and_says_something_else() -> None:
    method = ParkableMethod("unet", "forward", lambda *args, **kwargs: None)
    mask, classes = torch.ones(2, 4, dtype=torch.bool), torch.tensor([3, 4])
    kwargs = {"added": {"mask": mask, "text": [torch.ones(2, 6)]}, "table": torch.ones(7, 2)}
    call = make_call(method, (torch.ones(2, 3), torch.tensor(999), classes), kwargs)
    other = varied(call, torch.Generator().manual_seed(0))
    again = make_call(method, other.args, other.kwargs)
    assert again.key == call.key
    assert not torch.equal(other.args[0], call.args[0])
    assert 0 <= other.args[1] < 999
    assert not torch.equal(other.kwargs["added"]["text"][0], torch.ones(2, 6))
    assert other.kwargs["added"]["mask"] is mask
    assert other.kwargs["table"] is call.kwargs["table"]


def test_bits_are_compared_in_all_tensors() -> None:
    one = {"sample": torch.ones(2), "states": (torch.zeros(1),)}
    other = {"sample": torch.ones(2), "states": (torch.zeros(1) + 1e-9,)}
    assert same_bits(one, one)
    assert not same_bits(one, other)


class Watched(list[int]):
    """Counts how often it is looked into."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [2, 12, 48])
def test_thousands_of_calls_find_their_groups_of_in_one_walk(count: int) -> None:
    """Layers that get a vector a row are tried with as many: going round for each took 18 s."""
    rows = Watched([1] * 4000)
    assert sum(len(company) for company in groups_of(rows, count)) < 4000 + count
    assert rows.looks < 4 * len(rows)


def test_row_counts_for_which_memory_runs_out_agree_with_none() -> None:
    def scarce(sample: Tensor) -> tuple[Tensor]:
        if sample.shape[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (sample + 1,)

    calls = calls_of(scarce)
    assert independent_rows(calls, max_rows=32) == 8
    assert agreeing_row_counts(calls, (8, 16, 4)) == (8, 4)
    assert agreeing_row_counts(calls, (16, 8)) == ()
