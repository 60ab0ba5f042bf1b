"""Parts that the tiny image transformers have in common: text encoders, VAEs, arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from .family import NEGATIVE_PROMPT, Variation
from .tokenizers import VOCABULARY, clip_tokenizer, word_tokenizer

Module = TypeVar("Module", bound=nn.Module)

SIZE = 16
"""Width and height of every image, in pixels: eight by eight latents."""
TOKENS = 16
"""Of a prompt, padded."""
WIDTH = 32
"""Of every text encoder's output."""

# Prompts have to matter, or a prompt mixed up would go unseen: embeddings of about unit size.
INITIALIZER_RANGE = 1.0


def tiny_vae(
    latent_channels: int = 4, vae: type[AutoencoderKL] = AutoencoderKL, **more: Any
) -> AutoencoderKL:
    """An image VAE that halves width and height."""
    arguments: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": latent_channels,
        "sample_size": SIZE,
    }
    return vae(**{**arguments, **more})


def shifted_vae(
    latent_channels: int = 4, vae: type[AutoencoderKL] = AutoencoderKL
) -> AutoencoderKL:
    """As SD3, FLUX and most after them have it."""
    return tiny_vae(
        latent_channels,
        vae,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


class SharpVAE(AutoencoderKL):
    """A VAE whose posterior has no width, as that of a trained one nearly has none.

    For pipelines that sample it without the request's generator: with width, they would not
    repeat themselves even when called twice with the same arguments.
    """

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        (posterior,) = super().encode(x, return_dict=False)
        sharp = DiagonalGaussianDistribution(posterior.parameters, deterministic=True)
        return AutoencoderKLOutput(latent_dist=sharp) if return_dict else (sharp,)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=77,
    )


def tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(clip_config())


def tiny_clip_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config())


def t5_arguments() -> dict[str, Any]:
    """Of T5 and its multilingual kin."""
    return {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_ff": WIDTH,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**t5_arguments()))


def decoder_arguments() -> dict[str, Any]:
    """Of a language model that stands in as a text encoder: Gemma, GLM, Qwen, Mistral."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": INITIALIZER_RANGE,
    }


def clip_and_t5() -> dict[str, Any]:
    """The text encoders of FLUX."""
    return {
        "text_encoder": tiny_clip(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": tiny_t5(),
        "tokenizer_2": word_tokenizer(TOKENS),
    }


def without_zeros(module: Module) -> Module:
    """Random weights in place of those that start at zero: else a ControlNet would do nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return module


@contextmanager
def old_position_embedding() -> Iterator[None]:
    """Some models import theirs from where diffusers 1.0 will not have it, and it says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed`", FutureWarning)
        yield


def with_stronger_blocks(module: Module, factor: float = 2.0) -> Module:
    """Larger weights, where the default ones let the prompt through too weakly to be noticed."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= factor
    return module


def text_arguments(variation: Variation, **more: Any) -> dict[str, Any]:
    """What every pipeline takes, with a negative prompt unless `more` says `None`."""
    arguments = {
        "prompt": variation.prompt,
        "negative_prompt": NEGATIVE_PROMPT,
        "num_inference_steps": variation.num_inference_steps,
        "guidance_scale": variation.guidance_scale,
        "height": SIZE,
        "width": SIZE,
        "generator": variation.generator(),
        "output_type": "pt",
        **more,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def start_image(variation: Variation) -> torch.Tensor:
    """One of its own, to start from."""
    return variation.tensor(1, 3, SIZE, SIZE)


def mask(variation: Variation) -> torch.Tensor:
    """Which pixels of the image to paint anew: about half of them."""
    return variation.tensor(1, 1, SIZE, SIZE).round()
