"""The tiny image transformers are what the parity suite needs: quick, repeatable, telling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from families import flow_transformers, flux, pixart, qwen_readers, stable_diffusion_3
from families.family import Family, Variation, resident
from torch import Tensor

MODULES = (stable_diffusion_3, flux, pixart, flow_transformers, qwen_readers)
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
MIXED = {
    (family.name, scheduler) for family in FAMILIES.values() for scheduler in family.schedulers
}
# Of the range of an output: far above what another batch size may change.
TELLING = 0.05
# The least that a prompt alone changes: a hundred times a float32 image's round-off.
PROMPT_TELLS = 1e-3

# Its time embedding hands float32 values to its weights, whatever their dtype.


def call(family: Family, pipeline: Any, variation: Variation) -> Tensor:
    return family.result(pipeline(**family.arguments(pipeline, variation)))


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def test_names_are_unique() -> None:
    assert len(FAMILIES) == sum(len(module.FAMILIES) for module in MODULES)


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_give_finite_and_clearly_different_images(name: str) -> None:
    family, pipeline = FAMILIES[name], resident(FAMILIES[name])
    one, other = (call(family, pipeline, variation) for variation in family.variations(2))
    assert one.isfinite().all()
    assert other.isfinite().all()
    assert one.shape == other.shape
    assert largest_difference(one, other) > TELLING * (one.max() - one.min())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_built_anew_gives_the_same_image(name: str) -> None:
    family, variation = FAMILIES[name], FAMILIES[name].variations(2)[1]
    wanted = call(family, resident(family), variation)
    assert torch.equal(call(family, resident(family), variation), wanted)
    assert torch.equal(call(family, family.build(), variation), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_mixed_up_would_be_noticed(name: str) -> None:
    family, pipeline = FAMILIES[name], resident(FAMILIES[name])
    variation = family.variations(1)[0]
    one = call(family, pipeline, variation)
    other = call(family, pipeline, replace(variation, index=3))
    assert largest_difference(one, other) > PROMPT_TELLS


@pytest.mark.parametrize(("name", "scheduler"), sorted(MIXED))
def test_every_scheduler_that_is_mixed_in_works(name: str, scheduler: str) -> None:
    family = FAMILIES[name]
    pipeline = family.build()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    for variation in family.variations():
        assert call(family, pipeline, variation).isfinite().all()
