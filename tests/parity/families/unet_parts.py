"""Tiny modules that families with a UNet have in common. Random weights: build under `seeded`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel, VQModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from families.family import NEGATIVE_PROMPT, Variation, first_output
from families.tokenizers import VOCABULARY, clip_tokenizer

CLIP_VOCABULARY = 514
CHANNELS = (16, 32)
WIDTH = 32
"""Of every text encoder and of every cross attention."""
SIDE = 32
"""Of images, in pixels. Latents are half of that."""

SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
)


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """As in Stable Diffusion, for latents of 16 by 16."""
    settings: dict[str, Any] = {
        "sample_size": SIDE // 2,
        "block_out_channels": CHANNELS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | changes)


# What sets the UNet (and the ControlNet) of Stable Diffusion XL apart.
XL_SETTINGS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
}


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """Halves an image once."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        **changes,
    )


def tiny_movq() -> VQModel:
    """What Kandinsky decodes latents with."""
    return VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=8,
        norm_type="spatial",
        vq_embed_dim=4,
    )


def tiny_clip_text(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder for `clip_tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tiny_t5() -> T5EncoderModel:
    """A text encoder for `word_tokenizer`."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return T5EncoderModel(config)


def sd_scheduler() -> PNDMScheduler:
    """The noise schedule of Stable Diffusion, from which other schedulers are made."""
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        # Not this scheduler's, but for those that are made from it.
        "clip_sample": False,
    }
    return PNDMScheduler.from_config(config)


def sd_components(**changes: Any) -> dict[str, Any]:
    """All that a pipeline of the Stable Diffusion kind is made of."""
    components = {
        "unet": tiny_unet(),
        "vae": tiny_vae(),
        "text_encoder": tiny_clip_text(),
        "tokenizer": clip_tokenizer(),
        "scheduler": sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return components | changes


def xl_components(**changes: Any) -> dict[str, Any]:
    """All that a pipeline of the Stable Diffusion XL kind is made of."""
    components = {
        "unet": tiny_unet(**XL_SETTINGS),
        "vae": tiny_vae(),
        "text_encoder": tiny_clip_text(),
        "text_encoder_2": tiny_clip_text(projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": sd_scheduler(),
        "add_watermarker": False,
    }
    return components | changes


def fill_zeros(module: nn.Module, standard_deviation: float = 0.1) -> None:
    """Weights that begin at zero, such as a ControlNet's last ones, would hide the module."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=standard_deviation)


def relative_output(output: Any) -> Tensor:
    """Latents as parts of their largest value, which depends on the scheduler."""
    latents = first_output(output)
    return latents / latents.abs().max()


def common(variation: Variation) -> dict[str, Any]:
    """What every kind of request says."""
    return {
        "num_inference_steps": variation.num_inference_steps,
        "generator": variation.generator(),
        "output_type": "pt",
    }


def prompted(variation: Variation) -> dict[str, Any]:
    """A request with a prompt and guidance."""
    return common(variation) | {
        "prompt": variation.prompt,
        "negative_prompt": NEGATIVE_PROMPT,
        "guidance_scale": variation.guidance_scale,
    }


def text_to_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """A prompt and a size."""
    return prompted(variation) | {"height": SIDE, "width": SIDE}


def image_to_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """A prompt and an image to begin with."""
    image = variation.tensor(1, 3, SIDE, SIDE)
    return prompted(variation) | {"image": image, "strength": variation.strength}


def inpainting(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """A prompt, an image, and which half of its pixels to replace."""
    mask = (variation.tensor(1, 1, SIDE, SIDE) > 0.5).to(torch.float32)
    size = {"mask_image": mask, "height": SIDE, "width": SIDE}
    return image_to_image(pipeline, variation) | size
