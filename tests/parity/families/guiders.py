"""Pipelines whose guidance scale is held by a guider, an object of their own."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    LayerSkipConfig,
    SkipLayerGuidance,
)
from diffusers.guiders.guider_utils import BaseGuidance
from stepserve.pipelines.facts.guiders import set_guidance_scale
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    t5_arguments,
    text_arguments,
    with_stronger_blocks,
)
from .qwen_readers import tiny_qwen_vl
from .tokenizers import word_tokenizer

BYTES = 384
"""Tokens of ByT5: every byte, and some marks."""


def hunyuan_image(guider: BaseGuidance) -> HunyuanImagePipeline:
    pipeline = HunyuanImagePipeline(
        transformer=with_stronger_blocks(
            HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=WIDTH,
                text_embed_2_dim=WIDTH,
                rope_axes_dim=(8, 8),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=SIZE,
            scaling_factor=0.7,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        text_encoder=tiny_qwen_vl(),
        tokenizer=word_tokenizer(256),
        text_encoder_2=T5EncoderModel(T5Config(**{**t5_arguments(), "vocab_size": BYTES})),
        tokenizer_2=ByT5Tokenizer(),
        guider=guider,
    )
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = TOKENS
    return pipeline


def projected() -> HunyuanImagePipeline:
    """As the trained model has it, but that the projection begins within a tiny request's steps."""
    return hunyuan_image(
        AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3, guidance_scale=3.5)
    )


def skipping() -> HunyuanImagePipeline:
    """Its guider has the denoiser leave a layer out in one of the three predictions of a step."""
    layers = LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    return hunyuan_image(
        SkipLayerGuidance(
            skip_layer_config=layers,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )
    )


def guided(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """The guider of this pipeline, a copy, gets the scale."""
    arguments = text_arguments(variation)
    set_guidance_scale(pipeline, arguments.pop("guidance_scale"))
    return arguments


FAMILIES = (
    Family(
        "HunyuanImage",
        seeded(projected),
        guided,
        remark="its guider holds the guidance scale: each request has one of its own",
    ),
    Family("HunyuanImage, with a guider that skips layers", seeded(skipping), guided, shares=False),
)
