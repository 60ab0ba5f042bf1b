"""Calls with different scales of the output are one call with a scale of 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import ParkableMethod
from stepserve.engine.calls.output_scale import scaled, take_output_scale
from torch import Tensor

RULES = ArgumentRules(output_scale="conditioning_scale")


def control(
    sample: Tensor, conditioning_scale: Any = 1.0, repeat: bool = False
) -> tuple[list[Tensor], None]:
    return [sample.sin() * conditioning_scale], None


METHOD = ParkableMethod(
    "controlnet",
    "forward",
    control,
    parameters=("sample", "conditioning_scale", "repeat"),
    rules=RULES,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.7, 1, 0.0, 1.37])
@pytest.mark.parametrize("by_place", [True, False])
def test_the_scale_comes_afterwards_to_the_same_bits(
    dtype: torch.dtype, scale: float, by_place: bool
) -> None:
    sample = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    args = (sample, scale) if by_place else (sample,)
    kwargs: dict[str, Any] = {} if by_place else {"conditioning_scale": scale}
    neutral_args, neutral_kwargs, taken = take_output_scale(METHOD, args, kwargs)
    assert 1.0 in neutral_args[1:] or neutral_kwargs == {"conditioning_scale": 1.0}
    (result,), nothing = scaled(control(*neutral_args, **neutral_kwargs), taken)
    assert nothing is None
    (wanted,), _ = control(*args, **kwargs)
    assert result.dtype == dtype
    assert torch.equal(result, wanted)


def test_a_list_of_scales_belongs_to_several_inputs() -> None:
    kwargs = {"conditioning_scale": [0.5, 0.7]}
    assert take_output_scale(METHOD, (torch.ones(1),), kwargs)[1:] == (kwargs, 1.0)


def test_a_scale_that_is_not_given_is_one() -> None:
    assert take_output_scale(METHOD, (torch.ones(1),), {})[2] == 1.0
