"""Without a prompt: DDPM, DDIM, PNDM, latent diffusion, consistency models, and DiT."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)

from families.family import Family, Variation, seeded
from families.unet_parts import CHANNELS, SIDE, common, fill_zeros, tiny_vae

CLASSES = 10


def tiny_unet(**changes: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIDE // 2,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        **changes,
    )


def build_consistency() -> ConsistencyModelPipeline:
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    return ConsistencyModelPipeline(tiny_unet(num_class_embeds=CLASSES), scheduler)


def build_dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=SIDE // 2,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    fill_zeros(transformer)
    return DiTPipeline(transformer, tiny_vae(), DDIMScheduler())


def build_ldm() -> LDMPipeline:
    vqvae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        num_vq_embeddings=12,
        norm_num_groups=8,
    )
    return LDMPipeline(vqvae, tiny_unet(), DDIMScheduler())


def without_processor(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """These turn images into arrays by themselves, whatever is asked for."""
    return noise_only(pipeline, variation) | {"output_type": "np"}


def noise_only(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return common(variation)


def of_a_class(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return common(variation) | {"class_labels": [variation.index % CLASSES]}


def of_a_class_with_guidance(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return of_a_class(pipeline, variation) | {"guidance_scale": variation.guidance_scale}


FAMILIES = (
    Family(
        "DDPM",
        seeded(lambda: DDPMPipeline(tiny_unet(), DDPMScheduler())),
        noise_only,
        denoiser="unet",
        schedulers=("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"),
    ),
    Family(
        "DDIM",
        seeded(lambda: DDIMPipeline(tiny_unet(), DDIMScheduler())),
        noise_only,
        denoiser="unet",
    ),
    Family(
        "PNDM",
        seeded(lambda: PNDMPipeline(tiny_unet(), PNDMScheduler(skip_prk_steps=True))),
        without_processor,
        denoiser="unet",
        float64=False,
        bfloat16=False,
        remark="draws its noise in float32, whatever its modules are in",
    ),
    Family(
        "Latent diffusion, unconditional",
        seeded(build_ldm),
        without_processor,
        denoiser="unet",
        schedulers=("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
        float64=False,
        bfloat16=False,
        remark="draws its noise in float32, whatever its modules are in",
    ),
    Family(
        "Consistency model",
        seeded(build_consistency),
        of_a_class,
        denoiser="unet",
    ),
    Family(
        "DiT",
        seeded(build_dit),
        of_a_class_with_guidance,
        schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        remark="the pipeline gives its scheduler no generator: only those that draw no noise",
    ),
)
