"""Stable Diffusion 3, plain, from an image, inside a mask, and with a ControlNet."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    SharpVAE,
    mask,
    shifted_vae,
    start_image,
    text_arguments,
    tiny_clip_with_projection,
    tiny_t5,
    without_zeros,
)
from .tokenizers import clip_tokenizer, word_tokenizer

LATENT_CHANNELS = 16


def blocks(num_layers: int) -> dict[str, Any]:
    """Configuration that a ControlNet shares with the transformer."""
    return {
        "sample_size": SIZE // 2,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": num_layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": SIZE // 4,
    }


def components(vae: type[AutoencoderKL] = AutoencoderKL) -> dict[str, Any]:
    return {
        "transformer": SD3Transformer2DModel(**blocks(2)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": shifted_vae(LATENT_CHANNELS, vae),
        "text_encoder": tiny_clip_with_projection(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": tiny_clip_with_projection(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": tiny_t5(),
        "tokenizer_3": word_tokenizer(TOKENS),
    }


def from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(variation, max_sequence_length=TOKENS)


def from_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image, strength = start_image(variation), variation.strength
    return {**from_text(pipeline, variation), "image": image, "strength": strength}


def masked(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**from_image(pipeline, variation), "mask_image": mask(variation)}


def controlled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **from_text(pipeline, variation),
        "control_image": start_image(variation),
        "controlnet_conditioning_scale": 0.5 + 0.1 * variation.index,
    }


def controlnet() -> SD3ControlNetModel:
    return without_zeros(SD3ControlNetModel(**blocks(1)))


def with_controlnet() -> StableDiffusion3ControlNetPipeline:
    return StableDiffusion3ControlNetPipeline(controlnet=controlnet(), **components(SharpVAE))


FAMILIES = (
    Family(
        "Stable Diffusion 3",
        seeded(lambda: StableDiffusion3Pipeline(**components())),
        from_text,
    ),
    Family(
        "Stable Diffusion 3, image to image",
        seeded(lambda: StableDiffusion3Img2ImgPipeline(**components())),
        from_image,
    ),
    Family(
        "Stable Diffusion 3, inpainting",
        seeded(lambda: StableDiffusion3InpaintPipeline(**components())),
        masked,
    ),
    Family(
        "Stable Diffusion 3 with a ControlNet",
        seeded(with_controlnet),
        controlled,
        remark="it samples the VAE's posterior without the request's generator",
    ),
)
