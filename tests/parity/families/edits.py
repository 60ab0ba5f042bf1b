"""Pipelines of the Stable Diffusion kind that call the UNet in other ways."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)

from families.family import Family, Variation, seeded
from families.unet_parts import (
    SCHEDULERS,
    SIDE,
    XL_SETTINGS,
    prompted,
    sd_components,
    tiny_unet,
    tiny_vae,
    xl_components,
)


def build_instructed() -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline(**sd_components(unet=tiny_unet(in_channels=8)))


def instructed(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = variation.tensor(1, 3, SIDE, SIDE)
    return prompted(variation) | {"image": image, "image_guidance_scale": 1.5}


def build_instructed_xl() -> StableDiffusionXLInstructPix2PixPipeline:
    unet = tiny_unet(in_channels=8, **XL_SETTINGS)
    return StableDiffusionXLInstructPix2PixPipeline(**xl_components(unet=unet))


def instructed_xl(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return instructed(pipeline, variation) | {"height": SIDE, "width": SIDE}


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
        "InstructPix2Pix of Stable Diffusion XL",
        seeded(build_instructed_xl),
        instructed_xl,
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
