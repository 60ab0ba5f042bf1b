"""Pipelines of the size of known models, with random weights: for timing where none can be had."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from stepserve.models.catalogue import EMBEDDED
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel


def build_stable_diffusion(folder: Path, device: str) -> None:
    """A pipeline of the layout of Stable Diffusion 1.5 (860 million parameters in its UNet).

    Its numbers are random, so its images are noise; what it costs is what that model costs.
    """
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                projection_dim=768,
            )
        )
    StableDiffusionPipeline(
        vae=vae.bfloat16(),
        text_encoder=text_encoder.bfloat16(),
        tokenizer=AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        unet=unet.bfloat16(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
