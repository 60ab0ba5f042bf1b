"""Folders of other families than Stable Diffusion, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_model import tiny_clip_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32
CLIP_TOKENS = 77
T5_TOKENS = 12
WORDS = ("<pad>", "</s>", "<unk>", "red", "big", "heart", "apple")


def save_tiny_flux(folder: Path, guidance_embeds: bool = True, **manifest: object) -> Path:
    """FLUX: packed latents, guidance as an input, noise shifted by the image's size."""
    torch.manual_seed(0)
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(latent_channels=4),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=tiny_clip_tokenizer(CLIP_TOKENS),
        text_encoder_2=_t5(),
        tokenizer_2=word_tokenizer(),
    )
    return _save(pipeline, folder, manifest)


def save_tiny_sd3(folder: Path, **manifest: object) -> Path:
    """Stable Diffusion 3: three text encoders and a table of positions."""
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=6,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent_channels=4),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=tiny_clip_tokenizer(CLIP_TOKENS),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer_2=tiny_clip_tokenizer(CLIP_TOKENS),
        text_encoder_3=_t5(),
        tokenizer_3=word_tokenizer(),
    )
    return _save(pipeline, folder, manifest)


def save_tiny_dit(folder: Path) -> Path:
    """DiT has no tokenizer: it is told a class by number."""
    torch.manual_seed(0)
    pipeline = DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        vae=_vae(latent_channels=4),
        scheduler=DDIMScheduler(),
    )
    return _save(pipeline, folder, {})


def word_tokenizer(max_tokens: int = T5_TOKENS) -> PreTrainedTokenizerFast:
    """In place of T5's: a word is a token, and one ends the prompt."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_tokens,
    )


def _save(pipeline: Any, folder: Path, manifest: dict[str, object]) -> Path:
    pipeline.save_pretrained(folder)
    if manifest:
        (folder / "stepserve.json").write_text(json.dumps(manifest))
    return folder


def _t5() -> T5EncoderModel:
    sizes = {"d_model": WIDTH, "d_ff": WIDTH, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes))


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tiny_clip_tokenizer(CLIP_TOKENS)),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
