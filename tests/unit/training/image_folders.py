"""Folders of small images for the tests here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, side_px: int = 16) -> Image.Image:
    chance = np.random.default_rng(seed)
    return Image.fromarray(chance.integers(0, 255, (side_px, side_px, 3), np.uint8))


def write_image(folder: Path, name: str, image: Image.Image | int) -> Path:
    """An image file; a number makes an image that is like no other's."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels(image) if isinstance(image, int) else image).save(path)
    return path


def write_images(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_image(folder, name, seed)
    return folder
