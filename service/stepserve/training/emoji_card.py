"""What lies beside the weights of the emoji model: its card, recipe, manifest and licences."""

from __future__ import annotations

import json
import time
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from diffusers import StableDiffusionPipeline

from stepserve.training.data.artwork import PACKAGES
from stepserve.training.data.images import BACKGROUNDS
from stepserve.training.export import (
    TEMPLATES,
    Documents,
    count_parameters,
    describe_training,
    library_version,
    weights_mb,
)

if TYPE_CHECKING:
    from stepserve.training.emoji import EmojiRecipe

LICENCES = ("fluent-emoji-MIT.txt", "noto-emoji-Apache-2.0.txt")


def emoji_documents(
    pipeline: StableDiffusionPipeline, recipe: EmojiRecipe, images: int
) -> Documents:
    """Those of a pipeline that was trained on `images` pieces of artwork."""
    training = {
        **describe_training(pipeline, recipe.command, recipe, PACKAGES, images),
        "started_from": read_earlier(recipe.start_from),
    }
    manifest = {
        "description": "Small emoji images, trained on Noto Emoji and Fluent Emoji Flat artwork",
        "sizes": sizes(pipeline),
        "default_num_inference_steps": 20,
        "default_guidance_scale": 4.0,
        "created": int(time.time()),
    }
    return Documents(write_card(pipeline, recipe, training), training, manifest, LICENCES)


def read_earlier(folder: str | None) -> dict[str, Any] | None:
    """How the model in a folder was trained, as its `training.json` says; None for no folder."""
    if folder is None:
        return None
    path = Path(folder) / "training.json"
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return earlier


def write_card(
    pipeline: StableDiffusionPipeline, recipe: EmojiRecipe, training: dict[str, Any]
) -> str:
    """The model card, a Hugging Face `README.md`, filled in from the recipe and the parts."""
    template = Template((TEMPLATES / "emoji-card.md").read_text(encoding="utf-8"))
    return template.substitute(
        weights_mb=weights_mb(pipeline),
        folder_name="path/to/this/folder",
        **_history_values(training),
        **_data_values(training["images"]),
        **_shape_values(pipeline, recipe),
        **_objective_values(recipe),
    )


def sizes(pipeline: StableDiffusionPipeline) -> dict[str, int]:
    """Image sides in pixels: three quarters of the native one to twice it.

    The UNet must be able to halve the latents as often as it does, and diffusers insists on
    multiples of 8.
    """
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    step = max(8, pipeline.vae_scale_factor * 2**halvings)
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    smallest = max(step, native * 3 // 4 // step * step)
    return {"minimum": smallest, "maximum": 2 * native, "step": step, "native": native}


def _data_values(images: int) -> dict[str, str]:
    lines = [f"- `{p.name}` {p.version} from npm ({p.licence})" for p in PACKAGES]
    return {
        "packages": "\n".join(lines),
        "images": f"{images:,}",
        "backgrounds": ", ".join(f"`{name}`" for name in BACKGROUNDS),
        "background_count": str(len(BACKGROUNDS)),
        "resvg_version": library_version("resvg-py"),
    }


def _shape_values(pipeline: StableDiffusionPipeline, recipe: EmojiRecipe) -> dict[str, str]:
    shape, range_px = recipe.denoiser, sizes(pipeline)
    parameters = count_parameters(pipeline).items()
    return {
        "native_px": str(range_px["native"]),
        "smallest_px": str(range_px["minimum"]),
        "largest_px": str(range_px["maximum"]),
        "size_step_px": str(range_px["step"]),
        "vae_channels": ", ".join(map(str, recipe.vae.block_channels)),
        "unet_channels": ", ".join(map(str, shape.block_channels)),
        "head_width": str(shape.attention_head_width),
        "latent_size": str(shape.latent_size),
        "latent_channels": str(shape.latent_channels),
        "text_layers": str(shape.text_layers),
        "text_width": str(shape.text_width),
        "text_heads": str(shape.text_heads),
        "max_tokens": str(shape.max_tokens),
        "vocabulary": str(len(pipeline.tokenizer)),
        **{f"{name.split('_')[0]}_parameters": f"{count:,}" for name, count in parameters},
    }


def _objective_values(recipe: EmojiRecipe) -> dict[str, str]:
    shape = recipe.denoiser
    return {
        "kl_weight": str(recipe.vae.kl_weight),
        "timesteps": str(shape.timesteps),
        "beta_start": str(shape.beta_start),
        "beta_end": str(shape.beta_end),
        "snr_gamma": str(shape.snr_gamma),
        "caption_dropout_percent": f"{shape.caption_dropout * 100:.0f}",
        "seed": str(recipe.seed),
    }


def _history_values(training: dict[str, Any]) -> dict[str, str]:
    """The commands and the stages that led to a model, the first one first."""
    trainings = [training]
    while trainings[-1].get("started_from"):
        trainings.append(trainings[-1]["started_from"])
    trainings.reverse()
    loops = [("VAE", trainings[0]["recipe"]["vae_loop"])]
    loops += [("denoiser", training["recipe"]["denoiser_loop"]) for training in trainings]
    return {
        "commands": "\n".join(training["command"] for training in trainings),
        "stages": "\n".join(_stage_line(name, loop) for name, loop in loops),
    }


def _stage_line(name: str, loop: dict[str, Any]) -> str:
    samples = loop["steps"] * loop["batch_size"]
    return (
        f"| {name} | {loop['steps']:,} | {loop['batch_size']} | {samples:,} "
        f"| {loop['learning_rate']:g} to {loop['final_learning_rate']:g} | {loop['ema_decay']} |"
    )
