"""Diffusion transformers with noise-predicting schedulers: PixArt, Hunyuan-DiT, CogView 3."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import BertConfig, BertModel

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    text_arguments,
    tiny_t5,
    tiny_vae,
)
from .tokenizers import VOCABULARY, word_tokenizer

BERT_TOKENS = 77
T5_TOKENS = 256
"""As Hunyuan-DiT pads, whatever is asked for."""


def pixart_components() -> dict[str, Any]:
    return {
        "transformer": PixArtTransformer2DModel(
            sample_size=SIZE // 2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        "scheduler": DPMSolverMultistepScheduler(),
        "vae": tiny_vae(),
        "text_encoder": tiny_t5(),
        "tokenizer": word_tokenizer(TOKENS),
    }


def pixart_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(
        variation,
        max_sequence_length=TOKENS,
        use_resolution_binning=False,
        clean_caption=False,
    )


def tiny_bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=BERT_TOKENS,
        )
    )


def hunyuan(num_layers: int = 2, vae: type[AutoencoderKL] = AutoencoderKL) -> HunyuanDiTPipeline:
    return HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            num_layers=num_layers,
            num_attention_heads=3,
            attention_head_dim=8,
            hidden_size=24,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=16,
            text_len=BERT_TOKENS,
            text_len_t5=T5_TOKENS,
        ),
        scheduler=DDPMScheduler(),
        vae=tiny_vae(vae=vae),
        text_encoder=tiny_bert(),
        tokenizer=word_tokenizer(BERT_TOKENS),
        text_encoder_2=tiny_t5(),
        tokenizer_2=word_tokenizer(T5_TOKENS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def hunyuan_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(variation, use_resolution_binning=False)


def cogview_3() -> CogView3PlusPipeline:
    return CogView3PlusPipeline(
        transformer=CogView3PlusTransformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=SIZE // 4,
        ),
        scheduler=CogVideoXDDIMScheduler(),
        vae=tiny_vae(),
        text_encoder=tiny_t5(),
        tokenizer=word_tokenizer(TOKENS),
    )


def cogview_3_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(variation, max_sequence_length=TOKENS)


PIXART_SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "UniPCMultistepScheduler",
)

FAMILIES = (
    Family(
        "PixArt-alpha",
        seeded(lambda: PixArtAlphaPipeline(**pixart_components())),
        pixart_from_text,
        schedulers=PIXART_SCHEDULERS,
    ),
    Family(
        "PixArt-sigma",
        seeded(lambda: PixArtSigmaPipeline(**pixart_components())),
        pixart_from_text,
        schedulers=PIXART_SCHEDULERS,
    ),
    Family(
        "Hunyuan-DiT",
        seeded(hunyuan),
        hunyuan_from_text,
        schedulers=(
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerAncestralDiscreteScheduler",
            "DDIMScheduler",
        ),
    ),
    Family(
        "CogView 3 Plus",
        seeded(cogview_3),
        cogview_3_from_text,
        schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    ),
)
