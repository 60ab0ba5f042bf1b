"""Tiny pipelines that edit by instruction: everything that a request brings along can be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import flux_edits, other_edits, qwen_edits
from families.family import Family, Variation, resident
from PIL import Image, ImageChops
from torch import Tensor

MODULES = (flux_edits, other_edits, qwen_edits)
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
# Of the range of an output: far above what another batch size may change.
TELLING = 0.05
NOTICED = 1e-3
IMAGES = ("image", "images")

# They look at the suite's own models: `test_every_family.py` would fail with them.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def call(family: Family, variation: Variation, **changes: Any) -> Tensor:
    pipeline = resident(family)
    return family.result(pipeline(**family.arguments(pipeline, variation) | changes))


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def with_most_images(family: Family) -> Variation:
    return family.variations(3)[2]


def each_inverted(given: Any) -> list[Any]:
    """The same argument, with another one of its images inverted in each."""
    if isinstance(given, Image.Image):
        return [ImageChops.invert(given)]
    return [
        [
            ImageChops.invert(image) if index == changed else image
            for index, image in enumerate(given)
        ]
        for changed in range(len(given))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_give_finite_and_clearly_different_images(name: str) -> None:
    one, other = (call(FAMILIES[name], variation) for variation in FAMILIES[name].variations(2))
    assert one.isfinite().all()
    assert other.isfinite().all()
    assert largest_difference(one, other) > TELLING * (one.max() - one.min())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_built_anew_gives_the_same_image(name: str) -> None:
    family, variation = FAMILIES[name], FAMILIES[name].variations(2)[1]
    wanted = call(family, variation)
    assert torch.equal(call(family, variation), wanted)
    built = family.build()
    assert torch.equal(family.result(built(**family.arguments(built, variation))), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_mixed_up_would_be_noticed(name: str) -> None:
    """Each of up to three."""
    family = FAMILIES[name]
    variation = with_most_images(family)
    arguments = family.arguments(resident(family), variation)
    argument = next(argument for argument in IMAGES if argument in arguments)
    wanted = call(family, variation)
    for changed in each_inverted(arguments[argument]):
        assert largest_difference(call(family, variation, **{argument: changed}), wanted) > NOTICED


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_mixed_up_would_be_noticed(name: str) -> None:
    family = FAMILIES[name]
    variation = with_most_images(family)
    mask = family.arguments(resident(family), variation).get("mask_image")
    if mask is None:
        return
    changed = call(family, variation, mask_image=ImageChops.invert(mask))
    assert largest_difference(changed, call(family, variation)) > NOTICED


def test_a_second_image_to_look_at_would_be_noticed() -> None:
    family = FAMILIES["FLUX.2 Klein, inpainting"]
    variation = with_most_images(family)
    assert "image_reference" in family.arguments(resident(family), variation)
    changed = call(family, variation, image_reference=None)
    assert largest_difference(changed, call(family, variation)) > NOTICED
