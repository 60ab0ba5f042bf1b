"""Calls with and without residuals share a forward, and none of them can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_fakes import tensor_call
from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import Call, ParkableMethod
from stepserve.engine.calls.sharing import sharing_groups
from stepserve.engine.calls.stacking import split, stack
from torch import Tensor

RULES = ArgumentRules(
    residuals=frozenset({"down", "middle"}), residual_settings=frozenset({"repeat"})
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def denoise(
    sample: Tensor,
    text: Tensor | None = None,
    down: list[Tensor] | None = None,
    middle: Tensor | None = None,
    repeat: bool = False,
) -> Tensor:
    """Adds residuals where there are any, as UNets and transformers do."""
    for residual in (down or []) * (2 if repeat else 1):
        sample = sample + residual
    return sample if middle is None else sample + middle


METHOD = ParkableMethod(
    "unet",
    "forward",
    denoise,
    parameters=("sample", "text", "down", "middle", "repeat"),
    optional=frozenset({"text", "down", "middle"}),
    rules=RULES,
)


def call(*args: Any, **kwargs: Any) -> Call:
    return tensor_call(*args, rule=METHOD, **kwargs)


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator).to(dtype)


def shared(calls: list[Call], padded_rows: int = 0) -> list[Tensor]:
    assert len(sharing_groups(calls)) == 1
    args, kwargs = stack(calls, padded_rows)
    counts = [each.rows for each in calls]
    padding = max(padded_rows - sum(counts), 0)
    return split(denoise(*args, **kwargs), counts, padding)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Zeros of other signs are other bits."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_residuals_keep_every_bit(dtype: torch.dtype) -> None:
    special = torch.tensor([[0.0, -0.0, 1e-45], [float("inf"), -float("inf"), 3.5]]).to(dtype)
    plain = call(special, text=None)
    controlled = call(rows(2, 1, dtype), down=[rows(2, 2, dtype)], middle=rows(2, 3, dtype))
    for calls in ([plain, controlled], [controlled, plain]):
        outputs = dict(zip(calls, shared(calls, padded_rows=6), strict=True))
        assert same_bits(outputs[plain], special)
        assert same_bits(outputs[controlled], denoise(*controlled.args, **controlled.kwargs))


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["", "d", "m", "dm"])), min_size=1))
def test_any_mixture_gives_each_what_it_gets_alone(kinds: list[tuple[int, str]]) -> None:
    calls = []
    for seed, (count, has) in enumerate(kinds):
        down = {"down": [rows(count, seed + 100), rows(count, seed + 200)]} if "d" in has else {}
        middle = {"middle": rows(count, seed + 300)} if "m" in has else {}
        calls.append(call(rows(count, seed), **down, **middle))
    for each, output in zip(calls, shared(calls), strict=True):
        assert same_bits(output, denoise(*each.args, **each.kwargs))


def test_nothing_is_added_where_no_call_has_residuals() -> None:
    _, kwargs = stack([call(rows(1), down=None, repeat=False), call(rows(2), repeat=False)])
    assert kwargs == {"repeat": False}


def test_a_single_call_is_the_plain_call() -> None:
    residual = [rows(2)]
    args, kwargs = stack([call(rows(2), down=residual, repeat=True)])
    assert kwargs == {"down": residual, "repeat": True}
    assert args[0] is not None


def test_how_residuals_are_added_must_agree_among_those_that_have_any() -> None:
    plain = call(rows(1))
    repeated = call(rows(1, 1), down=[rows(1, 2)], repeat=True)
    once = call(rows(1, 3), down=[rows(1, 4)], repeat=False)
    assert sharing_groups([plain, repeated, once]) == [[plain, repeated], [once]]
    assert same_bits(shared([plain, repeated])[0], rows(1))
    assert sharing_groups([repeated, once, plain]) == [[repeated, plain], [once]]


def test_other_numbers_of_residuals_share_no_forward() -> None:
    """How many there are decides which blocks of a transformer they go to."""
    one = call(rows(1), down=[rows(1)])
    two = call(rows(1), down=[rows(1), rows(1)])
    assert sharing_groups([one, two]) == [[one], [two]]


@pytest.mark.parametrize(
    "residual",
    [rows(2).double(), rows(1)],
    ids=["a wider dtype would widen all rows", "no leading entry a row"],
)
def test_what_would_change_other_rows_is_an_argument_like_others(residual: Tensor) -> None:
    plain, other = call(rows(2)), call(rows(2), down=[residual])
    assert not other.residuals
    assert sharing_groups([plain, other]) == [[plain], [other]]


def test_channels_last_residuals_are_joined_without_being_rearranged() -> None:
    residual = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    calls = [call(torch.rand(1, 3, 4, 4)), call(torch.rand(2, 3, 4, 4), down=[residual])]
    _, kwargs = stack(calls)
    assert kwargs["down"][0].is_contiguous(memory_format=torch.channels_last)


def test_none_is_as_good_as_not_given_where_it_is_the_default() -> None:
    assert call(rows(1), text=None).key == call(rows(1)).key
    assert tensor_call(rows(1), extra=None).key != tensor_call(rows(1)).key
