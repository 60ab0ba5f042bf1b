"""Texts of any length are filled up to few lengths, and what a row gets stays the same."""

from __future__ import annotations

from itertools import pairwise
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
from stepserve.engine.calls.text_padding import LENGTHS, TextPadding, padded_length
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PADDING = TextPadding(("text", "places"), "mask")
WIDTH = 4


def attend(
    sample: Tensor, text: Tensor, mask: Tensor | None = None, places: Tensor | None = None
) -> Tensor:
    """Every row looks at its text, where the mask lets it."""
    keys = text if places is None else text + places
    seen = None if mask is None else mask.bool()[:, None]
    return sample + scaled_dot_product_attention(sample, keys, text, attn_mask=seen)


METHOD = ParkableMethod(
    "transformer",
    "forward",
    attend,
    parameters=("sample", "text", "mask", "places"),
    optional=frozenset({"mask", "places"}),
    rules=ArgumentRules(text=(PADDING,)),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def call(rows: int, tokens: int, seed: int = 0, **kwargs: Any) -> Call:
    sample, text = random(rows, 1, WIDTH, seed=seed), random(rows, tokens, WIDTH, seed=seed + 1)
    return tensor_call(sample, rule=METHOD, text=text, **kwargs)


def alone(rows: int, tokens: int, seed: int = 0, **kwargs: Any) -> Tensor:
    """What the plain call gives."""
    sample, text = random(rows, 1, WIDTH, seed=seed), random(rows, tokens, WIDTH, seed=seed + 1)
    return attend(sample, text, **kwargs)


@given(st.integers(1, 2 * LENGTHS[-1]))
def test_a_length_is_the_next_of_a_few(tokens: int) -> None:
    length = padded_length(tokens)
    assert length >= tokens
    assert length in LENGTHS or tokens > LENGTHS[-1]
    assert padded_length(length) == length
    assert not any(tokens <= other < length for other in LENGTHS)


def test_past_the_first_length_less_than_half_is_filled_in() -> None:
    assert all(length <= 2 * before for before, length in pairwise(LENGTHS))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, LENGTHS[0])), min_size=1, max_size=4))
def test_texts_of_any_length_share_and_rows_get_what_they_get_alone(
    requests: list[tuple[int, int]],
) -> None:
    calls = [call(*request, seed=10 * index) for index, request in enumerate(requests)]
    assert len(sharing_groups(calls)) == 1
    args, kwargs = stack(calls)
    outputs = split(attend(*args, **kwargs), [rows for rows, _ in requests])
    for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        torch.testing.assert_close(output, alone(*request, seed=10 * index), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, LENGTHS[0], LENGTHS[-1] + 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_the_mask_is_there_in_one_form_whatever_was_given(tokens: int, dtype: torch.dtype) -> None:
    given_mask = torch.ones(2, tokens).to(dtype)
    given_mask[1, tokens // 2 :] = 0
    without, within = call(2, tokens), call(2, tokens, mask=given_mask)
    assert without.key == within.key
    assert within.kwargs["mask"].dtype == torch.bool
    assert within.kwargs["mask"].shape == (2, padded_length(tokens))
    assert within.kwargs["mask"].sum(1).tolist() == [tokens, tokens // 2]
    assert without.kwargs["mask"].sum(1).tolist() == [tokens, tokens]
    wanted = alone(2, tokens, mask=given_mask)
    output = attend(*within.args, **within.kwargs)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)


def test_all_that_belongs_to_the_text_is_filled_up_as_far() -> None:
    places = random(2, 5, WIDTH, seed=7)
    filled = call(2, 5, places=places)
    assert filled.kwargs["places"].shape == filled.kwargs["text"].shape == (2, LENGTHS[0], WIDTH)
    output = attend(*filled.args, **filled.kwargs)
    torch.testing.assert_close(output, alone(2, 5, places=places), rtol=0, atol=1e-12)
    assert torch.equal(filled.kwargs["places"][:, :5], places)
    assert not filled.kwargs["places"][:, 5:].any()


def test_arguments_by_position_stay_there() -> None:
    sample, text = random(1, 1, WIDTH), random(1, 5, WIDTH)
    filled = tensor_call(sample, text, rule=METHOD)
    assert [tuple(value.shape) for value in filled.args] == [(1, 1, WIDTH), (1, LENGTHS[0], WIDTH)]
    assert list(filled.kwargs) == ["mask"]
    assert filled.args[0] is sample


def test_what_is_of_another_form_is_left_alone() -> None:
    text = random(2, 5, WIDTH)
    forms: list[dict[str, Any]] = [
        {},
        {"text": None},
        {"text": "a red heart"},
        {"text": text, "mask": torch.ones(2, 1, 5)},
        {"text": text, "mask": "causal"},
        {"text": text, "places": text[:, :3]},
        {"text": text[0, :, 0]},
    ]
    assert [PADDING.fill(form) for form in forms] == [{}] * len(forms)
