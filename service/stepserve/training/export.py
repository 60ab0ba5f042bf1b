"""The trained parts as a standard diffusers folder: bfloat16 safetensors, model card, licences."""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionPipeline

from stepserve.training.card import TEMPLATES, count_parameters, library_version, sizes, write_card
from stepserve.training.data.artwork import PACKAGES
from stepserve.training.errors import ExportError
from stepserve.training.loop.files import fresh_sibling, replace_folder

if TYPE_CHECKING:
    from stepserve.training.emoji import EmojiRecipe

MAX_FOLDER_BYTES = 50_000_000
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
LIBRARIES = (
    "diffusers",
    "numpy",
    "pillow",
    "resvg-py",
    "safetensors",
    "stepserve",
    "tokenizers",
    "torch",
    "transformers",
)


def export_pipeline(
    pipeline: StableDiffusionPipeline, recipe: EmojiRecipe, folder: Path, images: int
) -> Path:
    """Save a trained pipeline with its card, recipe and licences; `pipeline` becomes bfloat16.

    The folder appears as a whole, in place of an older one.

    Args:
        images: how many images it was trained on.

    Returns:
        `folder`.

    Raises:
        ExportError: it is over 50 MB, holds a pickle, or does not load again.
    """
    partial = fresh_sibling(folder)
    pipeline.to(torch.bfloat16)
    pipeline.unet.to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(partial, safe_serialization=True)
    write_json(partial / "training.json", describe_training(pipeline, recipe, images))
    write_json(partial / "stepserve.json", describe_for_server(pipeline))
    shutil.copytree(TEMPLATES / "LICENSES", partial / "LICENSES")
    write_card(partial, pipeline, recipe, images)
    _open_permissions(partial)
    check_promises(partial)
    replace_folder(partial, folder)
    return folder


def describe_training(
    pipeline: StableDiffusionPipeline, recipe: EmojiRecipe, images: int
) -> dict[str, Any]:
    """The whole recipe and what it was run with, as plain values."""
    return {
        "command": recipe.command,
        "recipe": asdict(recipe),
        "started_from": read_earlier(recipe.start_from),
        "artwork": [asdict(package) for package in PACKAGES],
        "images": images,
        "parameters": count_parameters(pipeline),
        "python": platform.python_version(),
        "versions": {name: library_version(name) for name in LIBRARIES},
    }


def describe_for_server(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """What Stepserve's loader wants to know beyond the diffusers folder."""
    return {
        "description": "Small emoji images, trained on Noto Emoji and Fluent Emoji Flat artwork",
        "sizes": sizes(pipeline),
        "default_num_inference_steps": 20,
        "default_guidance_scale": 4.0,
        "created": int(time.time()),
    }


def check_promises(folder: Path) -> None:
    """Whether a model folder is small, free of pickles, and loads again.

    Raises:
        ExportError: names what is wrong.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if pickles:
        raise ExportError(f"only safetensors may hold weights, but there is {', '.join(pickles)}")
    total_bytes = sum(path.stat().st_size for path in files)
    if total_bytes > MAX_FOLDER_BYTES:
        raise ExportError(f"the model takes {total_bytes / 1e6:.1f} MB, more than the 50 MB limit")
    try:
        StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"the saved model does not load again: {error}") from error


def read_earlier(folder: str | None) -> dict[str, Any] | None:
    """How the model in a folder was trained, as its `training.json` says; None for no folder."""
    if folder is None:
        return None
    path = Path(folder) / "training.json"
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return earlier


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain values as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open_permissions(folder: Path) -> None:
    # safetensors writes files that only their owner may read, and images copy modes.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
