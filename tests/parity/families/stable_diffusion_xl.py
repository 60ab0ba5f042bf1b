"""Stable Diffusion XL."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from families.family import Family, seeded
from families.unet_parts import (
    SCHEDULERS,
    image_to_image,
    inpainting,
    text_to_image,
    xl_components,
)

FAMILIES = (
    Family(
        "Stable Diffusion XL",
        seeded(lambda: StableDiffusionXLPipeline(**xl_components())),
        text_to_image,
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion XL, image to image",
        seeded(lambda: StableDiffusionXLImg2ImgPipeline(**xl_components())),
        image_to_image,
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion XL, inpainting",
        seeded(lambda: StableDiffusionXLInpaintPipeline(**xl_components())),
        inpainting,
        denoiser="unet",
        schedulers=SCHEDULERS,
        remark="UNet made for text to image: the pipeline puts back what the mask keeps",
    ),
)
