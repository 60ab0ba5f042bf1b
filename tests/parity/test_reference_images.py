"""Reference images: what a request gets with scales of its own is what diffusers makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ip_adapter_weights as weights
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from families import flux, references, stable_diffusion_3, unet_parts
from families.family import Variation, seeded
from PIL import Image
from stepserve.pipelines.references.adapters import Reference
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

VARIATION = Variation(index=2, seed=5, num_inference_steps=2, guidance_scale=4.0)


@dataclass(frozen=True)
class Case:
    """A kind of pipeline: without adapters, its adapter, and what a request says."""

    build: Callable[[], Any]
    load: Callable[[Any, int], None]
    arguments: Callable[[Any, Variation], dict[str, Any]]


def _unet(cls: Any, components: Callable[[], dict[str, Any]], kind: Any) -> Case:
    def load(pipeline: Any, times: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            adapter = kind(pipeline.unet)
        pipeline.load_ip_adapter([adapter] * times, "", [""] * times, image_encoder_folder=None)

    def build() -> Any:
        pipeline = cls(**components() | references.clip_parts())
        # Of Stable Diffusion's own, the first step's noise is that of two.
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    return Case(build, load, unet_parts.text_to_image)


def _load_flux(pipeline: Any, times: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapter = weights.flux_weights(pipeline.transformer)
    encoder = {"image_encoder_pretrained_model_name_or_path": None}
    pipeline.load_ip_adapter([adapter] * times, [""] * times, **encoder)


def _load_sd3(pipeline: Any, times: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapter = weights.sd3_weights(pipeline.transformer)
    pipeline.load_ip_adapter(adapter, image_encoder_folder=None)


def _truly_guided(pipeline: Any, variation: Variation) -> dict[str, Any]:
    scales = {"guidance_scale": 3.5, "true_cfg_scale": variation.guidance_scale}
    return flux.from_text(pipeline, variation) | {"negative_prompt": "a bad image"} | scales


CASES = {
    "Stable Diffusion": _unet(
        StableDiffusionPipeline, unet_parts.sd_components, weights.unet_weights
    ),
    "Stable Diffusion, Plus": _unet(
        StableDiffusionPipeline, unet_parts.sd_components, weights.unet_plus_weights
    ),
    "Stable Diffusion XL": _unet(
        StableDiffusionXLPipeline, unet_parts.xl_components, weights.unet_weights
    ),
    "FLUX": Case(
        lambda: FluxPipeline(**flux.components() | references.clip_parts()),
        _load_flux,
        flux.from_text,
    ),
    "FLUX, truly guided": Case(
        lambda: FluxPipeline(**flux.components() | references.clip_parts()),
        _load_flux,
        _truly_guided,
    ),
    "Stable Diffusion 3": Case(
        lambda: StableDiffusion3Pipeline(
            **stable_diffusion_3.components() | references.siglip_parts()
        ),
        _load_sd3,
        stable_diffusion_3.from_text,
    ),
}
SEVERAL = [name for name in CASES if name != "Stable Diffusion 3"]


@cache
def without_adapter(name: str, dtype: torch.dtype) -> Any:
    return seeded(CASES[name].build)().to(dtype)


@cache
def plain(name: str, dtype: torch.dtype, times: int) -> Any:
    """As diffusers has it: the adapter is loaded once for each image."""
    pipeline = seeded(CASES[name].build)()
    CASES[name].load(pipeline, times)
    return pipeline.to(dtype)


@cache
def held(name: str, dtype: torch.dtype) -> Any:
    """As Stepserve has it."""
    pipeline = seeded(CASES[name].build)()
    CASES[name].load(pipeline, 1)
    return references.hold(pipeline.to(dtype), 1)


def draw(name: str, pipeline: Any, guidance_scale: float, **more: Any) -> Tensor:
    copied = copy.copy(pipeline)
    copied.scheduler = copy.deepcopy(copied.scheduler)
    variation = Variation(2, 5, 2, guidance_scale)
    image: Tensor = copied(**CASES[name].arguments(copied, variation) | more)[0]
    return image


def draw_with(
    name: str, dtype: torch.dtype, guidance_scale: float, scales: Sequence[float]
) -> Tensor:
    """A request of its own."""
    copied = copy.copy(held(name, dtype))
    adapters = vars(copied)[references.HELD]
    asked = [Reference(images()[index], scale, "style") for index, scale in enumerate(scales)]
    return draw(name, copied, guidance_scale, **adapters.attach(copied, asked, guidance_scale))


@cache
def images() -> list[Image.Image]:
    return [references.image_of(VARIATION, index) for index in range(2)]


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_request_without_references_gets_what_it_gets_without_the_adapter(
    name: str, dtype: torch.dtype, guidance_scale: float
) -> None:
    """In every bit; of Stable Diffusion 3 to rounding, where guidance doubles the rows.

    Its attention hands part of a larger tensor to its last layer, and with an adapter a sum of that
    and of zeros: the same numbers, but laid out otherwise, for which torch takes another kernel.
    """
    expected = draw(name, without_adapter(name, dtype), guidance_scale)
    found = draw_with(name, dtype, guidance_scale, [])
    if name == "Stable Diffusion 3" and guidance_scale > 1:
        assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_reference_is_what_diffusers_makes_of_it(
    name: str, dtype: torch.dtype, guidance_scale: float
) -> None:
    """In every bit, at each scale."""
    pipeline, found = plain(name, dtype, 1), []
    for scale in (0.3, 1.0):
        pipeline.set_ip_adapter_scale(scale)
        expected = draw(name, pipeline, guidance_scale, ip_adapter_image=images()[0])
        found.append(draw_with(name, dtype, guidance_scale, [scale]))
        assert torch.equal(found[-1], expected)
    nothing = draw(name, without_adapter(name, dtype), guidance_scale)
    assert (found[0] - nothing).abs().max() > 1e-3
    assert (found[1] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SEVERAL)
def test_several_references_are_adapters_that_were_loaded_several_times(
    name: str, dtype: torch.dtype
) -> None:
    pipeline = plain(name, dtype, 2)
    pipeline.set_ip_adapter_scale([0.7, 0.4])
    expected = draw(name, pipeline, 4.0, ip_adapter_image=images())
    assert torch.equal(draw_with(name, dtype, 4.0, [0.7, 0.4]), expected)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_second_reference_with_a_scale_of_0_changes_nothing(name: str) -> None:
    one = draw_with(name, torch.float64, 4.0, [0.7])
    assert torch.equal(draw_with(name, torch.float64, 4.0, [0.7, 0.0]), one)
