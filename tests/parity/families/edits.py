"""Pipelines of the Stable Diffusion kind that call the UNet in other ways."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
)

from families.family import Family, Variation, seeded
from families.unet_parts import (
    SCHEDULERS,
    SIDE,
    prompted,
    sd_components,
    tiny_unet,
    tiny_vae,
)


def build_instructed() -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline(**sd_components(unet=tiny_unet(in_channels=8)))


def instructed(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = variation.tensor(1, 3, SIDE, SIDE)
    return prompted(variation) | {"image": image, "image_guidance_scale": 1.5}


def build_upscaler() -> StableDiffusionUpscalePipeline:
    components = sd_components(
        unet=tiny_unet(in_channels=7, num_class_embeds=100), vae=tiny_vae(scaling_factor=0.08333)
    )
    del components["requires_safety_checker"]
    return StableDiffusionUpscalePipeline(
        **components, low_res_scheduler=DDPMScheduler(), max_noise_level=90
    )


def upscaled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = variation.tensor(1, 3, SIDE // 2, SIDE // 2)
    return prompted(variation) | {"image": image, "noise_level": 20 + 10 * variation.index}


FAMILIES = (
    Family(
        "InstructPix2Pix",
        seeded(build_instructed),
        instructed,
        denoiser="unet",
        schedulers=SCHEDULERS,
        remark="three rows a request: with all, with the image only, with neither",
    ),
    Family(
        "Stable Diffusion upscaler",
        seeded(build_upscaler),
        upscaled,
        denoiser="unet",
        schedulers=SCHEDULERS,
        remark="the noise level is a class of the UNet",
    ),
)
