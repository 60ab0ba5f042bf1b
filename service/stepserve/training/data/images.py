"""Artwork to training images: painted on a background, mirrored, cropped."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from stepserve.training.data.artwork import Artwork

# The backgrounds a caption can ask for. Plain white is what an unmentioned background means.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (214, 40, 40),
    "orange": (247, 140, 40),
    "yellow": (250, 215, 60),
    "green": (60, 160, 75),
    "blue": (45, 105, 215),
    "light blue": (150, 205, 245),
    "purple": (130, 70, 180),
    "pink": (245, 150, 190),
    "brown": (120, 80, 50),
    "gray": (140, 140, 145),
    "black": (15, 15, 20),
}


def artwork_tensor(artwork: Artwork) -> torch.Tensor:
    """Pixels as (images, 4, size, size) uint8."""
    return torch.from_numpy(np.ascontiguousarray(artwork.pixels.transpose(0, 3, 1, 2)))


def paint(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Lay images over plain backgrounds.

    Args:
        rgba: (batch, 4, height, width) in 0..255, straight alpha.
        background: (batch, 3) in 0..255.

    Returns:
        (batch, 3, height, width) float32 in -1..1.
    """
    alpha = rgba[:, 3:].float() / 255
    mixed = rgba[:, :3].float() * alpha + background.float()[:, :, None, None] * (1 - alpha)
    return mixed / 127.5 - 1


def shrink(rgba: torch.Tensor, size_px: int) -> torch.Tensor:
    """Scale (batch, 4, height, width) images down by a whole factor, alpha-aware."""
    factor = rgba.shape[-1] // size_px
    if factor == 1:
        return rgba
    alpha = rgba[:, 3:].float()
    weighted = functional.avg_pool2d(rgba[:, :3].float() * alpha, factor)
    small_alpha = functional.avg_pool2d(alpha, factor)
    rgb = weighted / small_alpha.clamp(min=1e-3)
    return torch.cat([rgb, small_alpha], dim=1).round().clamp(0, 255).to(torch.uint8)


def mirror(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Flip the chosen images (batch,) left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)
