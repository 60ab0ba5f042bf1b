"""Every tiny video pipeline by itself, without the engine."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import diffusers
import pytest
import torch
from families import (
    video_from_images,
    video_transformers,
    video_unets,
    video_with_language_models,
)
from families.family import Family, Variation, resident
from torch import Tensor

MODULES = (
    video_transformers,
    video_from_images,
    video_with_language_models,
    video_unets,
)
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
pytestmark = pytest.mark.slow
# Its transformer embeds time in single precision, whatever it is cast to.


def video(family: Family, variation: Variation, pipeline: Any = None) -> Tensor:
    pipeline = pipeline or resident(family)
    return family.result(pipeline(**family.arguments(pipeline, variation)))


@pytest.mark.parametrize("name", FAMILIES)
def test_videos_differ_and_come_out_the_same_again(name: str) -> None:
    family = FAMILIES[name]
    variations = family.variations()

    videos = [video(family, variation) for variation in variations]
    assert all(torch.isfinite(one).all() for one in videos)
    for one, other in combinations(videos, 2):
        assert (one - other).abs().max() > 0.05
    assert torch.equal(videos[0], video(family, variations[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_same_at_every_build(name: str) -> None:
    family = FAMILIES[name]

    built, again = resident(family), family.build()
    weights = getattr(again, family.denoiser).state_dict()
    for key, weight in getattr(built, family.denoiser).state_dict().items():
        assert torch.equal(weight, weights[key]), key


SCHEDULERS = [(family.name, kind) for family in FAMILIES.values() for kind in family.schedulers]


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS)
def test_every_scheduler_denoises(name: str, scheduler: str) -> None:
    family = FAMILIES[name]

    pipeline = family.build()
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    assert torch.isfinite(video(family, family.variations(1)[0], pipeline)).all()
