"""Stable Cascade: a prior makes small latents of a prompt, and a decoder an image of those."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from families.family import Family, Variation, seeded
from families.tokenizers import clip_tokenizer
from families.unet_parts import WIDTH, prompted, relative_output, tiny_clip_text

LAYERS = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
ATTENTION_LAYERS = (*LAYERS, "SDCascadeAttnBlock")
PRIOR_CHANNELS = 4
SIDE = 64


def tiny_stage(**changes: Any) -> StableCascadeUNet:
    settings: dict[str, Any] = {
        "conditioning_dim": WIDTH,
        "block_out_channels": (32, 32),
        "num_attention_heads": (-1, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "block_types_per_layer": (LAYERS, ATTENTION_LAYERS),
        "clip_text_pooled_in_channels": WIDTH,
    }
    return StableCascadeUNet(**settings | changes)


def prior_components() -> dict[str, Any]:
    prior = tiny_stage(
        in_channels=PRIOR_CHANNELS,
        out_channels=PRIOR_CHANNELS,
        num_attention_heads=(2, 2),
        block_types_per_layer=(ATTENTION_LAYERS, ATTENTION_LAYERS),
        switch_level=(False,),
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
    )
    return {
        "prior": prior,
        "text_encoder": tiny_clip_text(projection=True),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def decoder_components() -> dict[str, Any]:
    return {
        "decoder": tiny_stage(in_channels=4, out_channels=4, effnet_in_channels=PRIOR_CHANNELS),
        "vqgan": PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=2),
        "text_encoder": tiny_clip_text(projection=True),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def build_prior() -> StableCascadePriorPipeline:
    return StableCascadePriorPipeline(
        **prior_components(), resolution_multiple=16, image_encoder=None, feature_extractor=None
    )


def build_decoder() -> StableCascadeDecoderPipeline:
    return StableCascadeDecoderPipeline(**decoder_components(), latent_dim_scale=4.0)


def build_combined() -> StableCascadeCombinedPipeline:
    prior = {f"prior_{name}": part for name, part in prior_components().items()}
    return StableCascadeCombinedPipeline(**decoder_components(), **prior)


def from_prompt(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return prompted(variation) | {"height": SIDE, "width": SIDE}


def from_latents(pipeline: Any, variation: Variation) -> dict[str, Any]:
    latents = 2 * variation.tensor(1, PRIOR_CHANNELS, 4, 4) - 1
    return prompted(variation) | {"image_embeddings": latents.to(pipeline.decoder.dtype)}


def both_stages(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = from_prompt(pipeline, variation)
    scale = arguments.pop("guidance_scale")
    return arguments | {
        "prior_num_inference_steps": variation.num_inference_steps,
        "prior_guidance_scale": scale,
        "decoder_guidance_scale": scale / 2,
    }


FAMILIES = (
    Family(
        "Stable Cascade, prior",
        seeded(build_prior),
        from_prompt,
        denoiser="prior",
        result=relative_output,
        remark="makes latents, no images",
    ),
    Family(
        "Stable Cascade, decoder",
        seeded(build_decoder),
        from_latents,
        denoiser="decoder",
    ),
    Family(
        "Stable Cascade, both stages",
        seeded(build_combined),
        both_stages,
        denoiser="decoder",
        remark="holds two pipelines with schedulers of their own, and a second denoiser",
    ),
)
