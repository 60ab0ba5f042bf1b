"""Tiny parts that several families of video pipelines have in common."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor

from .family import NEGATIVE_PROMPT, Variation
from .tokenizers import VOCABULARY, clip_tokenizer, word_tokenizer

TEXT_WIDTH = 32


def text_to_video(variation: Variation, size: int, **more: Any) -> dict[str, Any]:
    """What almost every pipeline takes."""
    return {
        "prompt": variation.prompt,
        "negative_prompt": NEGATIVE_PROMPT,
        "generator": variation.generator(),
        "num_inference_steps": variation.num_inference_steps,
        "guidance_scale": variation.guidance_scale,
        "height": size,
        "width": size,
        "output_type": "pt",
        **more,
    }


def embeddings_to_video(variation: Variation, size: int, **more: Any) -> dict[str, Any]:
    """For pipelines that clean texts with ftfy, which Stepserve does without."""
    wanted, unwanted = variation.tensor(2, 1, 16, TEXT_WIDTH)
    texts = {"prompt": None, "negative_prompt": None}
    embeddings = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted}
    return text_to_video(variation, size, **more) | texts | embeddings


def start_image(variation: Variation, size: int) -> Tensor:
    """An image to start from, as most pipelines take it."""
    return variation.tensor(1, 3, size, size)


def pil_images(variation: Variation, size: int, count: int = 1) -> list[Image.Image]:
    """The same for pipelines that take PIL images only, or a clip of them."""
    pixels = variation.tensor(count, size, size, 3).mul(255).byte().numpy()
    return [Image.fromarray(image) for image in pixels]


def t5(kind: str = "T5", width: int = TEXT_WIDTH) -> dict[str, Any]:
    """A text encoder of the T5 or UMT5 kind with its tokenizer."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        d_model=width,
        d_ff=37,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        relative_attention_num_buckets=8,
    )
    encoder = getattr(transformers, f"{kind}EncoderModel")(config)
    return {"text_encoder": encoder, "tokenizer": word_tokenizer()}


def clip_text(width: int = TEXT_WIDTH, projected: bool = False) -> dict[str, Any]:
    """The text encoder of CLIP with its tokenizer."""
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = getattr(transformers, kind)(config)
    return {"text_encoder": encoder, "tokenizer": clip_tokenizer()}


def second(parts: dict[str, Any]) -> dict[str, Any]:
    """The same parts under the names of a second text encoder."""
    return {f"{name}_2": part for name, part in parts.items()}


def clip_vision(width: int, size: int, patch_size: int) -> Any:
    """The image encoder of CLIP."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=size,
        patch_size=patch_size,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def randomize_zeros(module: torch.nn.Module) -> None:
    """Give weights that training starts from zero a say in the result."""
    for weight in module.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)


def wan_vae() -> Any:
    """Wan's VAE: 8 pixels and 4 frames to a latent."""
    return diffusers.AutoencoderKLWan(
        base_dim=6,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def hunyuan_vae() -> Any:
    """HunyuanVideo's VAE: 8 pixels and 4 frames to a latent."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )


def cogvideox_vae() -> Any:
    """CogVideoX' VAE: 8 pixels and 4 frames to a latent."""
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def ltx_vae() -> Any:
    """LTX' VAE."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def image_vae() -> Any:
    """A VAE that takes each frame for an image: 2 pixels to a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
