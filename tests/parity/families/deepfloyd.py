"""DeepFloyd IF: diffusion of pixels, first small ones, then large ones of the small."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline

from families.family import Family, Variation, seeded
from families.tokenizers import word_tokenizer
from families.unet_parts import SIDE, WIDTH, prompted, tiny_t5, tiny_unet


def pixel_components(in_channels: int = 3, **changes: Any) -> dict[str, Any]:
    unet = tiny_unet(
        sample_size=SIDE,
        in_channels=in_channels,
        out_channels=6,
        encoder_hid_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        **changes,
    )
    return {
        "unet": unet,
        "text_encoder": tiny_t5(),
        "tokenizer": word_tokenizer(77),
        "scheduler": tiny_scheduler(variance_type="learned_range", thresholding=True),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def tiny_scheduler(**changes: Any) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        beta_start=0.0001,
        beta_end=0.02,
        dynamic_thresholding_ratio=0.95,
        **changes,
    )


def build_super_resolution() -> IFSuperResolutionPipeline:
    # It sees the small image beside the noise, and how noisy that one was made.
    components = pixel_components(in_channels=6, class_embed_type="timestep")
    return IFSuperResolutionPipeline(**components, image_noising_scheduler=tiny_scheduler())


def pixels(pipeline: Any, variation: Variation) -> dict[str, Any]:
    # Cleaning would need packages that read HTML.
    return prompted(variation) | {"height": SIDE, "width": SIDE, "clean_caption": False}


def larger(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = 2 * variation.tensor(1, 3, SIDE // 2, SIDE // 2) - 1
    return pixels(pipeline, variation) | {"image": image, "noise_level": 200 + variation.index}


FAMILIES = (
    Family(
        "DeepFloyd IF", seeded(lambda: IFPipeline(**pixel_components())), pixels, denoiser="unet"
    ),
    Family(
        "DeepFloyd IF, super-resolution",
        seeded(build_super_resolution),
        larger,
        denoiser="unet",
    ),
)
