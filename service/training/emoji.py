"""The recipe of the embedded emoji model, from package names to a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from service.training.artwork import load_artwork
from service.training.captions import train_tokenizer
from service.training.denoiser import DenoiserConfig, DenoiserStage
from service.training.export import export_pipeline
from service.training.hyperparameters import LoopConfig
from service.training.latents import encode_artwork
from service.training.pictures import artwork_tensor
from service.training.vae import AutoencoderConfig, AutoencoderStage


@dataclass(frozen=True)
class EmojiRecipe:
    """Everything that decides what the trained model becomes."""

    seed: int = 0
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    vae_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=1500,
            batch_size=32,
            learning_rate=1.5e-3,
            final_learning_rate=2e-5,
            decay_fraction=0.4,
            ema_decay=0.995,
            sample_interval_steps=250,
        )
    )
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    denoiser_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=5000,
            batch_size=64,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            decay_fraction=0.4,
            sample_interval_steps=250,
        )
    )


def train_emoji(recipe: EmojiRecipe, folder: Path, cache: Path) -> Path:
    """Train the embedded model, or continue where an earlier call stopped.

    Args:
        recipe: hyperparameters and seed.
        folder: checkpoints and sample grids; the finished model lands in `folder/model`.
        cache: artwork packages and rendered pictures.

    Returns:
        The folder of the finished diffusers pipeline.
    """
    torch.manual_seed(recipe.seed)
    artwork = load_artwork(cache)
    pictures = artwork_tensor(artwork)
    autoencoder = AutoencoderStage(recipe.vae, recipe.vae_loop, pictures, folder / "vae").train()
    latents = encode_artwork(autoencoder, pictures, folder / "latents.safetensors")
    autoencoder.register_to_config(scaling_factor=latents.scaling_factor)
    shape = recipe.denoiser
    tokenizer = train_tokenizer(artwork.names, shape.vocabulary, shape.max_tokens)
    torch.manual_seed(recipe.seed + 1)
    stage = DenoiserStage(
        shape,
        recipe.denoiser_loop,
        artwork,
        latents,
        tokenizer,
        autoencoder,
        folder / "denoiser",
    )
    return export_pipeline(stage.train(), recipe, folder / "model")
