"""Videos with a UNet."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from .family import Family, Variation, seeded
from .video_parts import (
    clip_text,
    clip_vision,
    image_vae,
    pil_images,
    randomize_zeros,
    second,
    start_image,
    text_to_video,
)

IMAGE_SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")


def animated_unet(**more: Any) -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=2,
        **more,
    )
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False
    )
    return {"unet": unet, "motion_adapter": adapter, "vae": image_vae(), "scheduler": scheduler}


def animatediff_parts() -> dict[str, Any]:
    unet = animated_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    return unet | clip_text()


def animatediff() -> Any:
    return diffusers.AnimateDiffPipeline(**animatediff_parts())


def animatediff_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=2)


def animatediff_from_video() -> Any:
    return diffusers.AnimateDiffVideoToVideoPipeline(**animatediff_parts())


def animatediff_from_video_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(
        variation,
        16,
        video=pil_images(variation, 16, 2),
        strength=variation.strength,
        enforce_inference_steps=True,
    )


def animatediff_controlled() -> Any:
    parts = animatediff_parts()
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    randomize_zeros(controlnet)
    return diffusers.AnimateDiffControlNetPipeline(controlnet=controlnet, **parts)


def animatediff_controlled_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    frames = pil_images(variation, 16, 2)
    return text_to_video(variation, 16, num_frames=2, conditioning_frames=frames)


def animatediff_xl() -> Any:
    unet = animated_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    texts = clip_text() | second(clip_text(projected=True))
    return diffusers.AnimateDiffSDXLPipeline(**unet, **texts)


def stable_video() -> Any:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(4, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return diffusers.StableVideoDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2
        ),
        image_encoder=clip_vision(32, 16, 4),
        feature_extractor=transformers.CLIPImageProcessorPil(crop_size=16, size=16),
    )


def stable_video_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return {
        "image": start_image(variation, 16),
        "generator": variation.generator(),
        "num_inference_steps": variation.num_inference_steps,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": variation.guidance_scale,
        "num_frames": 2,
        "height": 16,
        "width": 16,
        "output_type": "pt",
    }


FAMILIES = (
    Family(
        "AnimateDiff, text to video",
        seeded(animatediff),
        animatediff_arguments,
        denoiser="unet",
        schedulers=IMAGE_SCHEDULERS,
    ),
    Family(
        "AnimateDiff, video to video",
        seeded(animatediff_from_video),
        animatediff_from_video_arguments,
        denoiser="unet",
        schedulers=IMAGE_SCHEDULERS,
        remark="casts the VAE to float32 and back around its encode",
    ),
    Family(
        "AnimateDiff, with a ControlNet",
        seeded(animatediff_controlled),
        animatediff_controlled_arguments,
        denoiser="unet",
        schedulers=IMAGE_SCHEDULERS,
    ),
    Family(
        "AnimateDiff XL, text to video",
        seeded(animatediff_xl),
        animatediff_arguments,
        denoiser="unet",
        schedulers=IMAGE_SCHEDULERS,
    ),
    Family(
        "Stable Video Diffusion",
        seeded(stable_video),
        stable_video_arguments,
        denoiser="unet",
        remark="in float16 it casts the VAE to float32 and back around its encode",
    ),
)
