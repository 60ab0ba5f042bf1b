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
from stepserve.engine.calls.text_padding import (
    LENGTHS,
    FrameBias,
    JointMask,
    TextMask,
    TextPadding,
    TokenMask,
    padded_length,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PADDING = TextPadding(TokenMask("mask"), text=("text", "more_text"))
WIDTH = 4


def attend(
    sample: Tensor, text: Tensor, mask: Tensor | None = None, more_text: Tensor | None = None
) -> Tensor:
    """Every row looks at its text, where the mask lets it."""
    keys = text if more_text is None else text + more_text
    seen = None if mask is None else mask.bool()[:, None]
    return sample + scaled_dot_product_attention(sample, keys, text, attn_mask=seen)


METHOD = ParkableMethod(
    "transformer",
    "forward",
    attend,
    parameters=("sample", "text", "mask", "more_text"),
    optional=frozenset({"mask", "more_text"}),
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
    more_text = random(2, 5, WIDTH, seed=7)
    filled = call(2, 5, more_text=more_text)
    assert filled.kwargs["more_text"].shape == filled.kwargs["text"].shape
    output = attend(*filled.args, **filled.kwargs)
    torch.testing.assert_close(output, alone(2, 5, more_text=more_text), rtol=0, atol=1e-12)
    assert torch.equal(filled.kwargs["more_text"][:, :5], more_text)
    assert not filled.kwargs["more_text"][:, 5:].any()


def test_lists_of_texts_and_places_of_tokens_are_filled_up_as_well() -> None:
    layers, places = [random(2, 5, 3), random(2, 5, 3, seed=1)], random(5, 2)
    padding = TextPadding(TokenMask("mask"), text=("layers",), places=("places",))
    filled = padding.fill({"layers": layers, "places": places, "other": 1})
    assert filled.keys() == {"layers", "places", "mask"}
    assert [layer.shape for layer in filled["layers"]] == [(2, LENGTHS[0], 3)] * 2
    assert filled["places"].shape == (LENGTHS[0], 2)
    assert torch.equal(filled["places"][:5], places)
    assert not filled["places"][5:].any()


def test_arguments_by_position_stay_there() -> None:
    sample, text = random(1, 1, WIDTH), random(1, 5, WIDTH)
    filled = tensor_call(sample, text, rule=METHOD)
    assert [tuple(value.shape) for value in filled.args] == [(1, 1, WIDTH), (1, LENGTHS[0], WIDTH)]
    assert list(filled.kwargs) == ["mask"]
    assert filled.args[0] is sample


def test_a_mask_of_text_and_image_keeps_what_it_says_of_the_image() -> None:
    image, text = random(2, 3, WIDTH), random(2, 5, WIDTH)
    padding = TextPadding(JointMask("extra", "mask", "image"), text=("text",))
    of_text = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    of_image = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    joint = torch.cat([of_text, of_image], dim=1)[:, None, None]
    extra = {"mask": joint, "scale": 2.0}
    filled = padding.fill({"image": image, "text": text, "extra": extra})["extra"]
    assert filled["scale"] == 2.0
    assert torch.equal(filled["mask"][:, 0, 0, :5], of_text)
    assert not filled["mask"][:, 0, 0, 5 : LENGTHS[0]].any()
    assert torch.equal(filled["mask"][:, 0, 0, LENGTHS[0] :], of_image)
    # Nobody else's arguments are written to.
    assert extra["mask"] is joint


@pytest.mark.parametrize("extra", [{}, {"extra": None}, {"extra": {}}])
def test_without_a_mask_of_text_and_image_all_of_both_counts(extra: dict[str, Any]) -> None:
    padding = TextPadding(JointMask("extra", "mask", "image"), text=("text",))
    arguments = {"image": random(2, 3, WIDTH), "text": random(2, 5, WIDTH), **extra}
    mask = padding.fill(arguments)["extra"]["mask"]
    assert mask.shape == (2, 1, 1, LENGTHS[0] + 3)
    assert mask[:, 0, 0].sum(1).tolist() == [8, 8]
    assert mask[:, 0, 0, -3:].all()


def test_what_is_added_to_scores_is_there_for_each_frame() -> None:
    video, text = random(2, 4, 3, 1, 1), random(2, 5, WIDTH).bfloat16()
    padding = TextPadding(FrameBias("bias", "video"), text=("text",))
    bias = padding.fill({"video": video, "text": text})["bias"]
    assert bias.shape == (6, 1, LENGTHS[0])
    assert bias.dtype == torch.bfloat16
    assert not bias[..., :5].any()
    assert torch.isneginf(bias[..., 5:]).all()


TEXT = random(2, 5, WIDTH)
IMAGE = random(2, 3, WIDTH)
OTHER_FORMS: list[tuple[TextMask, dict[str, Any]]] = [
    (TokenMask("mask"), {}),
    (TokenMask("mask"), {"text": None}),
    (TokenMask("mask"), {"text": "a red heart"}),
    (TokenMask("mask"), {"text": TEXT[0, :, 0]}),
    (TokenMask("mask"), {"text": TEXT, "mask": torch.ones(2, 1, 5)}),
    (TokenMask("mask"), {"text": TEXT, "mask": "causal"}),
    (TokenMask("mask"), {"text": TEXT, "more_text": TEXT[:, :3]}),
    (TokenMask("mask"), {"text": TEXT, "more_text": TEXT[:1]}),
    (TokenMask("mask"), {"text": TEXT, "places": random(4, 3)}),
    (JointMask("extra", "mask", "image"), {"text": TEXT, "image": IMAGE, "extra": {"mask": TEXT}}),
    (FrameBias("bias", "image"), {"text": TEXT, "image": IMAGE, "bias": torch.zeros(2, 1, 5)}),
]


@pytest.mark.parametrize(("mask", "arguments"), OTHER_FORMS)
def test_what_is_of_another_form_is_left_alone(mask: TextMask, arguments: dict[str, Any]) -> None:
    padding = TextPadding(mask, text=("text", "more_text"), places=("places",))
    assert padding.fill(arguments) == {}
