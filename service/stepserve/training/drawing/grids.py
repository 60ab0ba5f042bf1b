"""Picture grids, to see how training goes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stepserve.training.loop.files import write_atomically


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A (3, height, width) tensor in -1..1 as an RGB picture."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()))


def tile(pictures: list[Image.Image], columns: int, gap_px: int = 2) -> Image.Image:
    """Lay pictures of equal size out in rows of `columns`."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", size, "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * (width + gap_px), row * (height + gap_px)))
    return sheet


def save_grid(batch: torch.Tensor, path: Path, columns: int) -> None:
    """Write a (batch, 3, height, width) tensor in -1..1 as one PNG sheet."""
    buffer = io.BytesIO()
    tile([to_picture(pixels) for pixels in batch], columns).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
