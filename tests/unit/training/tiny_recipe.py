"""A recipe whose training takes seconds."""

from __future__ import annotations

from stepserve.training.emoji import EmojiRecipe
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.stages.denoiser import DenoiserConfig
from stepserve.training.stages.vae import AutoencoderConfig


def tiny_recipe(seed: int = 0, steps: int = 4) -> EmojiRecipe:
    """16 px images, 8x8 latents, a useless model."""
    loop = LoopConfig(
        steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        seed=seed,
        warmup_steps=2,
        checkpoint_interval_steps=2,
        sample_interval_steps=steps,
    )
    return EmojiRecipe(
        seed=seed,
        vae=AutoencoderConfig(
            image_px=16, latent_channels=4, block_channels=(8, 16), norm_groups=4
        ),
        vae_loop=loop,
        denoiser=DenoiserConfig(
            latent_channels=4,
            block_channels=(16, 32),
            attention_head_width=16,
            time_embedding_width=32,
            norm_groups=4,
            text_width=32,
            text_layers=1,
            text_heads=2,
            vocabulary=700,
            max_tokens=16,
        ),
        denoiser_loop=loop,
    )
