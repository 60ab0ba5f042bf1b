"""Image grids, to see how training goes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stepserve.training.loop.files import write_atomically


def to_image(pixels: torch.Tensor) -> Image.Image:
    """A (3, height, width) tensor in -1..1 as an RGB image."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()))


def tile(images: list[Image.Image], columns: int, gap_px: int = 2) -> Image.Image:
    """Lay images of equal size out in rows of `columns`."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap_px), row * (height + gap_px)))
    return sheet


def save_grid(batch: torch.Tensor, path: Path, columns: int) -> None:
    """Write a (batch, 3, height, width) tensor in -1..1 as one PNG sheet."""
    save_png(tile([to_image(pixels) for pixels in batch], columns), path)


def save_png(image: Image.Image, path: Path) -> Path:
    """Write an image atomically; returns `path`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
    return path
