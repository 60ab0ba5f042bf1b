"""Folders of models that take no prompt: tiny, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
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

CLASSES = 10
SIDE_PX = 16
NAMES = {0: "tench, Tinca tinca", 134: "crane", 281: "tabby, tabby cat", 517: "crane"}


def unet(classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIDE_PX,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    )


def consistency(classes: int | None) -> ConsistencyModelPipeline:
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    return ConsistencyModelPipeline(unet(classes), scheduler)


def latent_diffusion() -> LDMPipeline:
    vqvae = VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=12,
        norm_num_groups=4,
    )
    return LDMPipeline(vqvae, unet(), DDIMScheduler())


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    # Its gates begin at zero, where no class would make a difference.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE_PX,
    )
    return DiTPipeline(transformer, vae, DDIMScheduler())


BUILDERS = {
    "ddpm": lambda: DDPMPipeline(unet(), DDPMScheduler()),
    "ddim": lambda: DDIMPipeline(unet(), DDIMScheduler()),
    "pndm": lambda: PNDMPipeline(unet(), PNDMScheduler()),
    "ldm": latent_diffusion,
    "consistency": lambda: consistency(None),
    "consistency-of-classes": lambda: consistency(CLASSES),
    "dit": dit,
}


def save_unconditional(name: str, folder: Path, **manifest: object) -> Path:
    """One of `BUILDERS`, as diffusers saves it."""
    torch.manual_seed(0)
    pipeline: Any = BUILDERS[name]()
    pipeline.save_pretrained(folder)
    if name == "dit":
        # As the published ones have them.
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": NAMES}))
    if manifest:
        (folder / "stepserve.json").write_text(json.dumps(manifest))
    return folder
