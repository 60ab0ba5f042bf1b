"""Every tiny video pipeline by itself, without the engine."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import video_transformers, video_unets
from families.family import Family, Variation
from torch import Tensor

FAMILIES = {
    family.name: family
    for module in (video_transformers, video_unets)
    for family in module.FAMILIES
}


@cache
def pipeline_of(name: str) -> Any:
    return FAMILIES[name].build()


def video(family: Family, variation: Variation) -> Tensor:
    pipeline = pipeline_of(family.name)
    return family.result(pipeline(**family.arguments(pipeline, variation)))


@pytest.mark.parametrize("name", FAMILIES)
def test_videos_differ_and_come_out_the_same_again(name: str) -> None:
    family = FAMILIES[name]
    one, other = family.variations(2)

    first = video(family, one)
    assert torch.isfinite(first).all()
    assert (first - video(family, other)).abs().max() > 0.05
    assert torch.equal(first, video(family, one))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_same_at_every_build(name: str) -> None:
    family = FAMILIES[name]

    built, again = pipeline_of(name), family.build()
    weights = getattr(again, family.denoiser).state_dict()
    for key, weight in getattr(built, family.denoiser).state_dict().items():
        assert torch.equal(weight, weights[key]), key
