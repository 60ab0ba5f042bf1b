"""Stable Diffusion, its adapters, and what is distilled from it."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig

from families.family import Family, Variation, seeded
from families.unet_parts import (
    SCHEDULERS,
    WIDTH,
    image_to_image,
    inpainting,
    sd_components,
    text_to_image,
    tiny_unet,
)


def lora(*target_modules: str) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=4, target_modules=list(target_modules), init_lora_weights=False
    )


def build_unet_lora() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(**sd_components())
    pipeline.unet.add_adapter(lora("to_q", "to_k", "to_v", "to_out.0"))
    return pipeline


def build_text_encoder_lora() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(**sd_components())
    pipeline.text_encoder.add_adapter(lora("q_proj", "k_proj", "v_proj", "out_proj"))
    return pipeline


def with_lora_scale(
    scales: tuple[float, ...], pipeline: Any, variation: Variation
) -> dict[str, Any]:
    scale = scales[variation.index % len(scales)]
    return text_to_image(pipeline, variation) | {"cross_attention_kwargs": {"scale": scale}}


def build_latent_consistency() -> LatentConsistencyModelPipeline:
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=True
    )
    unet = tiny_unet(time_cond_proj_dim=WIDTH)
    return LatentConsistencyModelPipeline(**sd_components(unet=unet, scheduler=scheduler))


def latent_consistency(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = text_to_image(pipeline, variation)
    del arguments["negative_prompt"]
    return arguments


FAMILIES = (
    Family(
        "Stable Diffusion",
        seeded(lambda: StableDiffusionPipeline(**sd_components())),
        text_to_image,
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion, image to image",
        seeded(lambda: StableDiffusionImg2ImgPipeline(**sd_components())),
        image_to_image,
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion, inpainting",
        seeded(
            lambda: StableDiffusionInpaintPipeline(**sd_components(unet=tiny_unet(in_channels=9)))
        ),
        inpainting,
        denoiser="unet",
        schedulers=SCHEDULERS,
        remark="UNet made for inpainting, with nine input channels",
    ),
    Family(
        "Stable Diffusion with a LoRA of the UNet",
        seeded(build_unet_lora),
        partial(with_lora_scale, (0.7,)),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion with a LoRA of the UNet, a scale a request",
        seeded(build_unet_lora),
        partial(with_lora_scale, (0.5, 1.0)),
        denoiser="unet",
        schedulers=SCHEDULERS,
        least_sharing=1.5,
        remark="requests share whatever their scales, plain calls where these are equal",
    ),
    Family(
        "Stable Diffusion with a LoRA of the text encoder, a scale a request",
        seeded(build_text_encoder_lora),
        partial(with_lora_scale, (0.25, 1.0, 0.5)),
        denoiser="unet",
        schedulers=SCHEDULERS,
        least_sharing=1.1,
        remark="requests share whatever their scales, plain calls where these are equal",
    ),
    Family(
        "Latent consistency model",
        seeded(build_latent_consistency),
        latent_consistency,
        denoiser="unet",
    ),
)
