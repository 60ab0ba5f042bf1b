"""The recipe of the embedded emoji model, from package names to a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from stepserve.private_files import make_own_folder
from stepserve.training.data.artwork import Artwork, load_artwork
from stepserve.training.data.captions import find_tokenizer, keep_tokenizer, train_tokenizer
from stepserve.training.data.images import artwork_tensor
from stepserve.training.data.latents import encode_artwork
from stepserve.training.emoji_card import emoji_documents
from stepserve.training.errors import StartingModelError
from stepserve.training.export import export_pipeline
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.stages.denoiser import DenoiserConfig, DenoiserStage
from stepserve.training.stages.vae import AutoencoderConfig, AutoencoderStage


@dataclass(frozen=True)
class EmojiRecipe:
    """Everything that decides what the trained model becomes.

    `start_from` is the folder of an earlier model of the same shapes: its autoencoder and tokenizer
    are kept, and its text encoder and denoiser are trained further.

    Raises:
        ValueError: the denoiser does not fit the autoencoder's latents.
    """

    seed: int = 0
    start_from: str | None = None
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
            steps=4750,
            batch_size=64,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            decay_fraction=0.4,
            sample_interval_steps=250,
        )
    )

    def __post_init__(self) -> None:
        made = (self.vae.latent_channels, self.vae.latent_size)
        wanted = (self.denoiser.latent_channels, self.denoiser.latent_size)
        if made != wanted:
            raise ValueError(
                f"the autoencoder makes latents of (channels, size) {made}, "
                f"the denoiser wants {wanted}"
            )

    @property
    def command(self) -> str:
        """The command line that runs this recipe."""
        steps = self.denoiser_loop.steps
        command = f"stepserve train emoji --seed {self.seed} --steps {steps}"
        if self.start_from is not None:
            command += f" --start-from {self.start_from} --output runs/emoji-further"
        usual = make_recipe(self.seed, steps, start_from=self.start_from) == self
        return command if usual else f"{command}  # and the changes to be seen in training.json"


def make_recipe(
    seed: int = 0,
    denoiser_steps: int | None = None,
    vae_steps: int | None = None,
    batch_size: int | None = None,
    vae_batch_size: int | None = None,
    sample_interval_steps: int | None = None,
    checkpoint_interval_steps: int | None = None,
    start_from: str | None = None,
) -> EmojiRecipe:
    """The recipe of the embedded model with some values changed; None keeps the recipe's own.

    Raises:
        ValueError: a number is not positive.
    """
    usual = EmojiRecipe()
    both = {
        "seed": seed,
        "sample_interval_steps": sample_interval_steps,
        "checkpoint_interval_steps": checkpoint_interval_steps,
    }
    return replace(
        usual,
        seed=seed,
        start_from=start_from,
        vae_loop=usual.vae_loop.changed(steps=vae_steps, batch_size=vae_batch_size, **both),
        denoiser_loop=usual.denoiser_loop.changed(
            steps=denoiser_steps, batch_size=batch_size, **both
        ),
    )


def train_emoji(
    recipe: EmojiRecipe, folder: Path, cache: Path, artwork: Artwork | None = None
) -> Path:
    """Train the embedded model, or continue where an earlier call stopped.

    Args:
        recipe: hyperparameters and seed.
        folder: checkpoints and sample grids; the finished model lands in `folder/model`.
        cache: artwork packages and rendered images.
        artwork: images to learn instead of the packages', twice `recipe.vae.image_px` wide.

    Returns:
        The folder of the finished diffusers pipeline.

    Raises:
        TrainingError: see `stepserve.training.errors`.
        NotPrivateError: other users may write to one of the folders.
        KeyboardInterrupt: Ctrl-C; the same call goes on where it stopped.
    """
    for own in (folder, cache):
        make_own_folder(own)
    torch.manual_seed(recipe.seed)
    start = None if recipe.start_from is None else load_start(Path(recipe.start_from))
    artwork = artwork or load_artwork(cache, 2 * recipe.vae.image_px)
    images = artwork_tensor(artwork)
    autoencoder = _autoencoder(recipe, start, images, folder)
    latents = encode_artwork(autoencoder, images, folder / "latents.safetensors")
    autoencoder.register_to_config(scaling_factor=latents.scaling_factor)
    tokenizer = start.tokenizer if start else _tokenizer(recipe.denoiser, artwork, folder)
    torch.manual_seed(recipe.seed + 1)
    stage = DenoiserStage(
        recipe.denoiser,
        recipe.denoiser_loop,
        artwork,
        latents,
        tokenizer,
        autoencoder,
        folder / "denoiser",
    )
    if start is not None:
        stage.start_from(start)
    pipeline = stage.train()
    documents = emoji_documents(pipeline, recipe, len(artwork))
    return export_pipeline(pipeline, documents, folder / "model")


def load_start(folder: Path) -> StableDiffusionPipeline:
    """The model that a training goes on from, in float32.

    Raises:
        StartingModelError: there is none in `folder`.
    """
    try:
        return StableDiffusionPipeline.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise StartingModelError(f"no model to start from in {folder}: {error}") from error


def _autoencoder(
    recipe: EmojiRecipe, start: StableDiffusionPipeline | None, images: torch.Tensor, folder: Path
) -> AutoencoderKL:
    if start is not None:
        return start.vae
    return AutoencoderStage(recipe.vae, recipe.vae_loop, images, folder / "vae").train()


def _tokenizer(shape: DenoiserConfig, artwork: Artwork, folder: Path) -> CLIPTokenizer:
    """The tokenizer that the denoiser's checkpoint was trained with, or a new one."""
    kept = folder / "tokenizer"
    started = (folder / "denoiser" / "checkpoint.pt").exists()
    found = find_tokenizer(kept, folder / "model" / "tokenizer") if started else None
    if found is not None:
        return found
    tokenizer = train_tokenizer(artwork.names, shape.vocabulary, shape.max_tokens)
    keep_tokenizer(tokenizer, kept)
    return tokenizer
