"""The trained parts as a standard diffusers folder: bfloat16 safetensors, model card, licences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import StableDiffusionPipeline

if TYPE_CHECKING:
    from service.training.emoji import EmojiRecipe


def export_pipeline(pipeline: StableDiffusionPipeline, recipe: EmojiRecipe, folder: Path) -> Path:
    """Save `pipeline` in bfloat16 under `folder` and return that folder."""
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
