"""Kandinsky 2.2, whose prior makes embeddings of a prompt for a decoder, and Kandinsky 3."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from families.family import Family, Variation, seeded
from families.tokenizers import clip_tokenizer, word_tokenizer
from families.unet_parts import (
    SIDE,
    WIDTH,
    common,
    prompted,
    tiny_clip_text,
    tiny_movq,
    tiny_t5,
    tiny_unet,
)

# Else the first steps of a random network would leave latents that only the last decoder can bear.
THRESHOLDING: dict[str, Any] = {
    "thresholding": True,
    "sample_max_value": 2.0,
    "dynamic_thresholding_ratio": 0.99,
}


def tiny_prior() -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1
    )
    # It begins at zero, and so would every embedding be.
    nn.init.ones_(prior.clip_std)
    return prior


def tiny_clip_vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=SIDE,
        patch_size=16,
    )
    return CLIPVisionModelWithProjection(config)


def build_prior() -> KandinskyV22PriorPipeline:
    return KandinskyV22PriorPipeline(
        prior=tiny_prior(),
        image_encoder=tiny_clip_vision(),
        text_encoder=tiny_clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        image_processor=None,
    )


def build_decoder() -> KandinskyV22Pipeline:
    unet = tiny_unet(
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        **THRESHOLDING,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=tiny_movq())


def from_embeddings(pipeline: Any, variation: Variation) -> dict[str, Any]:
    positive, negative = 4 * variation.tensor(2, 1, WIDTH) - 2
    return common(variation) | {
        "image_embeds": positive,
        "negative_image_embeds": negative,
        "guidance_scale": variation.guidance_scale,
        "height": SIDE,
        "width": SIDE,
    }


def build_kandinsky_3() -> Kandinsky3Pipeline:
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        encoder_hid_dim=WIDTH,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1, **THRESHOLDING
    )
    return Kandinsky3Pipeline(
        unet=unet,
        scheduler=scheduler,
        movq=tiny_movq(),
        text_encoder=tiny_t5(),
        tokenizer=word_tokenizer(128),
    )


def kandinsky_3(pipeline: Any, variation: Variation) -> dict[str, Any]:
    # Its latents are always a whole number of eights.
    return prompted(variation) | {"height": SIDE // 2, "width": SIDE // 2}


FAMILIES = (
    Family(
        "Kandinsky 2.2, prior",
        seeded(build_prior),
        lambda pipeline, variation: prompted(variation),
        denoiser="prior",
        remark="makes embeddings, no images",
    ),
    Family(
        "Kandinsky 2.2, decoder",
        seeded(build_decoder),
        from_embeddings,
        denoiser="unet",
        schedulers=("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    ),
    Family(
        "Kandinsky 3",
        seeded(build_kandinsky_3),
        kandinsky_3,
        denoiser="unet",
        schedulers=("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"),
        remark="requests share where their prompts have equally many tokens",
    ),
)
