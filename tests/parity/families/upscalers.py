"""Pipelines that enlarge an image: of latents, of pixels, and DeepFloyd IF from an image."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    IFImg2ImgSuperResolutionPipeline,
    LDMSuperResolutionPipeline,
    StableDiffusionLatentUpscalePipeline,
    UNet2DModel,
    VQModel,
)

from families.deepfloyd import pixel_components, tiny_scheduler
from families.family import Family, Variation, seeded
from families.unet_parts import (
    CHANNELS,
    SIDE,
    WIDTH,
    common,
    prompted,
    sd_components,
    tiny_unet,
    tiny_vae,
)

# Of the latent upscaler: one half is ones and the other zeros, as no noise is added to the image.
NOISE_LEVEL_WIDTH = 128


def build_latent_upscaler() -> StableDiffusionLatentUpscalePipeline:
    unet = tiny_unet(
        # Of the image beside those that are denoised; one channel more is said and not used.
        in_channels=8,
        out_channels=5,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        mid_block_type=None,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=None,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_cond_proj_dim=NOISE_LEVEL_WIDTH + WIDTH,
        timestep_post_act="gelu",
    )
    parts = sd_components(
        unet=unet, scheduler=EulerDiscreteScheduler(prediction_type="sample"), vae=tiny_vae()
    )
    needed = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return StableDiffusionLatentUpscalePipeline(**{name: parts[name] for name in needed})


def build_super_resolution() -> LDMSuperResolutionPipeline:
    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=6,
        out_channels=3,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    # Else what stands beside the noise would hardly count in a few steps of random weights.
    unet.conv_in.weight.data *= 4
    # Few codes, far apart: else rounding would choose another one now and then.
    vqvae = VQModel(
        num_vq_embeddings=8,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=3,
        norm_num_groups=8,
    )
    return LDMSuperResolutionPipeline(vqvae, unet, DDIMScheduler(clip_sample=False))


def build_image_super_resolution() -> IFImg2ImgSuperResolutionPipeline:
    components = pixel_components(in_channels=6, class_embed_type="timestep")
    return IFImg2ImgSuperResolutionPipeline(**components, image_noising_scheduler=tiny_scheduler())


def enlarged(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return prompted(variation) | {"image": variation.tensor(1, 3, SIDE // 2, SIDE // 2)}


def without_prompt(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return common(variation) | {"image": 2 * variation.tensor(1, 3, SIDE // 2, SIDE // 2) - 1}


def from_both_sizes(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """The image in its own size, and what the first stage made of it, which is smaller."""
    small = 2 * variation.tensor(1, 3, SIDE // 2, SIDE // 2) - 1
    original = 2 * variation.tensor(1, 3, SIDE, SIDE) - 1
    return prompted(variation) | {
        "image": small,
        "original_image": original,
        "strength": variation.strength,
        "noise_level": 200 + variation.index,
        "clean_caption": False,
    }


FAMILIES = (
    Family(
        "Stable Diffusion latent upscaler",
        seeded(build_latent_upscaler),
        enlarged,
        denoiser="unet",
        remark="twice the size of the image, whose latents stand beside those of the step",
    ),
    Family(
        "Latent diffusion super-resolution",
        seeded(build_super_resolution),
        without_prompt,
        denoiser="unet",
        schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
        bfloat16=False,
        remark="no prompt; latents become the nearest codes, of which bfloat16 may choose others",
    ),
    Family(
        "DeepFloyd IF, super-resolution from an image",
        seeded(build_image_super_resolution),
        from_both_sizes,
        denoiser="unet",
    ),
)
