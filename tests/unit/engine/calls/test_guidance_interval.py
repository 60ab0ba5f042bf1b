from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from stepserve.engine.calls.guidance_interval import GuidanceInterval, GuidanceIntervalError

NOTHING: frozenset[str] = frozenset()


class Pair(NamedTuple):
    one: torch.Tensor
    other: object


def interval(rows: int = 4) -> GuidanceInterval:
    return GuidanceInterval(rows, calls=5, needs_all=lambda call: call in (1, 2))


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float32).reshape(shape)


def test_calls_are_counted_for_each_method() -> None:
    one = interval()
    assert [one.is_due("unet.forward") for _ in range(4)] == [True, False, False, True]
    assert [one.is_due("controlnet.forward") for _ in range(3)] == [True, False, False]


def test_rows_ahead_are_half_once_no_call_needs_all_any_more() -> None:
    assert [interval().rows_from(index) for index in range(6)] == [4, 4, 4, 2, 2, 2]
    never = GuidanceInterval(4, calls=5, needs_all=lambda call: False)
    assert never.rows_from(0) == 2
    # Steps beyond those that were expected are like the last one.
    at_the_end = GuidanceInterval(4, calls=5, needs_all=lambda call: call >= 3)
    assert [at_the_end.rows_from(index) for index in (0, 5, 6)] == [4, 4, 4]


def test_the_second_half_of_everything_that_has_rows_is_kept() -> None:
    sample, text, residual = numbered(4, 3, 2), numbered(4, 5), numbered(4, 1, 1)
    timestep, alone, whole = torch.tensor(999), torch.tensor([7]), numbered(3, 2)
    args, kwargs = interval().narrow(
        (sample, timestep),
        {
            "text": text,
            "added": {"residuals": [residual, residual], "ids": (whole, None)},
            "times": torch.arange(4),
            "alone": alone,
            "return_dict": False,
        },
        NOTHING,
    )
    assert torch.equal(args[0], sample[2:])
    assert args[1] is timestep
    assert torch.equal(kwargs["text"], text[2:])
    assert [torch.equal(part, residual[2:]) for part in kwargs["added"]["residuals"]] == [True] * 2
    assert kwargs["added"]["ids"] == (whole, None)
    assert kwargs["times"].tolist() == [2, 3]
    assert kwargs["alone"] is alone
    assert kwargs["return_dict"] is False


def test_arguments_without_rows_stay_whatever_their_leading_size() -> None:
    shared, sample = numbered(4, 2), numbered(4, 3)
    args, kwargs = interval().narrow((sample,), {"rotary": shared}, frozenset({"rotary"}))
    assert args[0].shape == (2, 3)
    assert kwargs["rotary"] is shared


def test_named_tuples_stay_what_they_are() -> None:
    (pair,), _ = interval().narrow((Pair(numbered(4, 2), "x"),), {}, NOTHING)
    assert isinstance(pair, Pair)
    assert pair.one.shape == (2, 2)
    assert pair.other == "x"


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_other_rows_than_were_promised_are_an_error(rows: int) -> None:
    """Such as a pipeline that calls the denoiser once for each half."""
    with pytest.raises(GuidanceIntervalError, match="a call of 4 rows was expected"):
        interval().narrow((numbered(rows, 3), torch.tensor(1)), {"text": None}, NOTHING)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: tensor,
        lambda tensor: (tensor,),
        lambda tensor: [tensor],
        lambda tensor: {"sample": tensor},
        lambda tensor: UNet2DConditionOutput(sample=tensor),
    ],
)
def test_both_halves_get_the_same_answer(wrap: object) -> None:
    assert callable(wrap)
    answer = numbered(2, 3)
    wide = interval().widen(wrap(answer))
    assert type(wide) is type(wrap(answer))
    if isinstance(wide, UNet2DConditionOutput):
        wide = wide.sample
    elif isinstance(wide, dict):
        wide = wide["sample"]
    elif not isinstance(wide, torch.Tensor):
        (wide,) = wide
    assert torch.equal(wide, torch.cat([answer, answer]))


def test_guidance_of_two_equal_halves_changes_no_bit() -> None:
    """Why the pipeline need not know: u + g * (c - u) with u = c."""
    conditional = torch.randn(2, 1000).bfloat16()
    wide = interval().widen(conditional)
    unconditional, text = wide.chunk(2)
    for scale in (1.5, 4.0, 30.0):
        assert torch.equal(unconditional + scale * (text - unconditional), conditional)


def test_an_output_without_rows_is_an_error() -> None:
    for output in (torch.tensor(1.0), numbered(4, 2)):
        with pytest.raises(GuidanceIntervalError, match="for 2 rows"):
            interval().widen((output,))
