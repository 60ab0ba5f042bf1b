"""Processors that perturb row by row give what those give that diffusers swaps in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families.catalogue import FAMILIES
from families.family import seeded
from families.perturbed_attention import AS_DIFFUSERS_HAS_THEM, name_of
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.modules.perturbed_rows import ProcessorByRow, hold_perturbed_rows
from stepserve.pipelines.modules.wrappers import Wrappers, describe_wrappers, wrap_modules
from stepserve.pipelines.probing.sharing_check import difference

FLOAT64_BOUND = 1e-6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("base", AS_DIFFUSERS_HAS_THEM)
def test_a_request_gets_what_diffusers_own_processors_give(base: str) -> None:
    family = FAMILIES[name_of(base)]
    untouched = seeded(AS_DIFFUSERS_HAS_THEM[base])().to(torch.float64)
    held = family.build().to(torch.float64)
    for variation in family.variations():
        arguments = family.arguments(untouched, variation)
        wanted = family.result(untouched(**arguments))
        copied = copy_pipeline(held)
        got = family.result(copied(**family.arguments(copied, variation)))
        assert difference(wanted, got) <= FLOAT64_BOUND


def test_the_scale_changes_the_image() -> None:
    family = FAMILIES[name_of("Stable Diffusion")]
    held = family.build()
    variation = replace(family.variations(1)[0], num_inference_steps=4)
    images = [
        family.result(copied(**family.arguments(copied, variation) | {"pag_scale": scale}))
        for scale in (0.0, 3.0)
        for copied in [copy_pipeline(held)]
    ]
    assert difference(*images) > 1e-2


def test_the_processors_of_the_shared_denoiser_are_set_once() -> None:
    family = FAMILIES[name_of("Stable Diffusion")]
    held = family.build()
    before = held.unet.attn_processors
    assert any(isinstance(processor, ProcessorByRow) for processor in before.values())
    copied = copy_pipeline(held)
    copied(**family.arguments(copied, family.variations(1)[0]))
    assert held.unet.attn_processors == before
    assert "unet.forward: perturbed rows" in describe_wrappers(held)


def test_a_copy_that_perturbs_other_layers_is_left_as_it_is() -> None:
    """What it changes is seen when it is probed, and its requests run one at a time."""
    held = FAMILIES[name_of("Stable Diffusion")].build()
    held.set_pag_applied_layers("down")
    assert copy_pipeline(held).unet is held.unet


def test_other_pipelines_are_left_as_they_are() -> None:
    pipeline = FAMILIES["Stable Diffusion"].build()
    assert hold_perturbed_rows(pipeline) == {}
    wrap_modules(pipeline, Wrappers())
    assert copy_pipeline(pipeline).unet is pipeline.unet
