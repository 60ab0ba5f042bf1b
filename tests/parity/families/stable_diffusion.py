"""Stable Diffusion, its adapters, and what is distilled from it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig

from families.family import Family, Variation, seeded
from families.unet_parts import (
    CHANNELS,
    SCHEDULERS,
    WIDTH,
    image_to_image,
    inpainting,
    sd_components,
    text_to_image,
    tiny_unet,
)

IMAGE_TOKENS = 4


def build_ip_adapter() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(**sd_components())
    pipeline.load_ip_adapter(ip_adapter_weights(pipeline.unet), "", "", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.7)
    return pipeline


def ip_adapter_weights(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What a file of weights holds: keys and values for each cross attention, in their order."""
    width_of_block = {
        "down_blocks.0": CHANNELS[0],
        "mid_block": CHANNELS[1],
        "up_blocks.1": CHANNELS[0],
    }
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    layers = {}
    for index, name in enumerate(crossing):
        (width,) = (w for block, w in width_of_block.items() if name.startswith(block))
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{kind}.weight"] = torch.randn(width, WIDTH) / WIDTH**0.5
    projection = {
        "proj.weight": torch.randn(IMAGE_TOKENS * WIDTH, WIDTH) / WIDTH**0.5,
        "proj.bias": torch.zeros(IMAGE_TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def with_image_prompt(pipeline: Any, variation: Variation) -> dict[str, Any]:
    # The image's embedding stands behind that of no image, as the pipeline prepares them.
    embedding = 4 * variation.tensor(1, 1, WIDTH) - 2
    embeddings = torch.cat([torch.zeros_like(embedding), embedding])
    return text_to_image(pipeline, variation) | {"ip_adapter_image_embeds": [embeddings]}


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


def with_perturbed_attention(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_to_image(pipeline, variation) | {"pag_scale": 2.0 + variation.index}


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
        "Stable Diffusion with an IP-Adapter",
        seeded(build_ip_adapter),
        with_image_prompt,
        denoiser="unet",
        schedulers=SCHEDULERS,
        remark="embeddings are given and the scale is the same for all requests",
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
        remark="requests share where their scales are equal",
    ),
    Family(
        "Stable Diffusion with a LoRA of the text encoder, a scale a request",
        seeded(build_text_encoder_lora),
        partial(with_lora_scale, (0.25, 1.0, 0.5)),
        denoiser="unet",
        schedulers=SCHEDULERS,
        least_sharing=1.1,
        remark="requests share where their scales are equal",
    ),
    Family(
        "Stable Diffusion with perturbed-attention guidance",
        seeded(lambda: StableDiffusionPAGPipeline(**sd_components(pag_applied_layers="mid"))),
        with_perturbed_attention,
        denoiser="unet",
        schedulers=SCHEDULERS,
        shares=False,
        remark="the call swaps attention processors of the shared UNet",
    ),
    Family(
        "Latent consistency model",
        seeded(build_latent_consistency),
        latent_consistency,
        denoiser="unet",
    ),
)
