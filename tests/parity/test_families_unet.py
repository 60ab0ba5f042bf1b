"""Whether the tiny pipelines with a UNet are fit to compare: nothing is shared here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from families import (
    cascade,
    controlled,
    deepfloyd,
    edits,
    kandinsky,
    references,
    stable_diffusion,
    stable_diffusion_xl,
    unclip,
    unconditional,
    upscalers,
)
from families.catalogue import FAMILIES as EVERY_FAMILY
from families.family import Family, Variation
from torch import Tensor

MODULES = (
    stable_diffusion,
    stable_diffusion_xl,
    edits,
    controlled,
    references,
    kandinsky,
    cascade,
    deepfloyd,
    unclip,
    unconditional,
    upscalers,
)
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
# Far more than rounding, which moves them by 1e-5 of the range and less.
LEAST_DIFFERENCE = 0.05
LEAST_EFFECT = 0.01


# They look at the suite's own models: `test_every_family.py` would fail with them.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def call(family: Family, pipeline: Any, variation: Variation, **changes: Any) -> Tensor:
    """One plain call, with the scheduler that is the variation's turn."""
    if family.schedulers:
        scheduler = family.schedulers[variation.index % len(family.schedulers)]
        config = pipeline.scheduler.config
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(config)
    return family.result(pipeline(**family.arguments(pipeline, variation) | changes))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, as a part of the range of both."""
    both = torch.stack([one, other])
    return float((one - other).abs().max() / (both.max() - both.min()))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_requests_differ_and_can_be_repeated(family: Family) -> None:
    pipeline = family.build()
    assert not getattr(pipeline, family.denoiser).training
    one, other = family.variations(2)
    first, second = call(family, pipeline, one), call(family, pipeline, other)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert difference(first, second) > LEAST_DIFFERENCE
    assert torch.equal(call(family, pipeline, one), first)
    assert torch.equal(call(family, family.build(), other), second)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_all_variations_can_be_asked_for(family: Family) -> None:
    """Every scheduler, number of steps and strength."""
    pipeline = family.build()
    results = [call(family, pipeline, variation) for variation in family.variations(6)]
    assert all(result.isfinite().all() for result in results)
    assert all(
        difference(one, other) > LEAST_DIFFERENCE
        for index, one in enumerate(results)
        for other in results[:index]
    )


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    [
        ("Stable Diffusion", "prompt", lambda _: "a cold lake"),
        ("Stable Diffusion, image to image", "image", lambda image: 1 - image),
        ("Stable Diffusion, inpainting", "mask_image", lambda mask: 1 - mask),
        (
            "Stable Diffusion with an IP-Adapter",
            "ip_adapter_image_embeds",
            lambda embeddings: [embeddings[0].flip(-1)],
        ),
        (
            "Stable Diffusion with a LoRA of the UNet, a scale a request",
            "cross_attention_kwargs",
            lambda _: {"scale": 0.0},
        ),
        (
            "Stable Diffusion with a LoRA of the text encoder, a scale a request",
            "cross_attention_kwargs",
            lambda _: {"scale": 0.0},
        ),
        ("Stable Diffusion with perturbed-attention guidance", "pag_scale", lambda _: 0.0),
        ("Stable Diffusion with a ControlNet", "image", lambda image: 1 - image),
        (
            "Stable Diffusion with two ControlNets",
            "image",
            lambda images: [images[0], 1 - images[1]],
        ),
        ("Stable Diffusion XL with a ControlNet", "image", lambda image: 1 - image),
        ("Stable Diffusion with a T2I-Adapter", "image", lambda image: 1 - image),
        ("Kandinsky 2.2, prior", "prompt", lambda _: "a cold lake"),
        ("Kandinsky 2.2, decoder", "image_embeds", lambda embedding: -embedding),
        ("Stable Cascade, decoder", "image_embeddings", lambda latents: -latents),
        ("DeepFloyd IF, super-resolution", "image", lambda image: -image),
        ("DeepFloyd IF, super-resolution", "noise_level", lambda level: level + 1),
        ("InstructPix2Pix", "image", lambda image: 1 - image),
        ("Stable Diffusion upscaler", "noise_level", lambda level: level + 1),
        ("Stable Diffusion latent upscaler", "image", lambda image: 1 - image),
        ("Stable Diffusion latent upscaler", "prompt", lambda _: "a cold lake"),
        ("Latent diffusion super-resolution", "image", lambda image: -image),
        (
            "DeepFloyd IF, super-resolution from an image",
            "original_image",
            lambda image: -image,
        ),
        ("StableUnCLIP", "prior_guidance_scale", lambda _: 9.0),
        ("DiT", "class_labels", lambda labels: [labels[0] + 1]),
        ("Consistency model", "class_labels", lambda labels: [labels[0] + 1]),
    ],
)
def test_what_a_request_asks_for_can_be_seen(
    name: str, argument: str, change: Callable[[Any], Any]
) -> None:
    """Else it would go unseen that one request was given what another asked for."""
    family = EVERY_FAMILY[name]
    pipeline = family.build()
    variation = family.variations(3)[2]
    asked = family.arguments(pipeline, variation).get(argument)
    plain = call(family, pipeline, variation)
    changed = call(family, pipeline, variation, **{argument: change(asked)})
    assert difference(plain, changed) > LEAST_EFFECT
