"""Painting, mirroring, shrinking, and image sheets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from stepserve.training.data.artwork import Artwork
from stepserve.training.data.images import artwork_tensor, mirror, paint, shrink
from stepserve.training.drawing.grids import save_grid, tile, to_image


def rgba(red: int, alpha: int, size: int = 4) -> torch.Tensor:
    image = torch.zeros(1, 4, size, size, dtype=torch.uint8)
    image[:, 0], image[:, 3] = red, alpha
    return image


@pytest.mark.parametrize(("alpha", "wanted"), [(0, -1.0), (255, 1.0)])
def test_paint_lays_the_image_over_its_background(alpha: int, wanted: float) -> None:
    painted = paint(rgba(255, alpha), torch.tensor([[0, 255, 0]]))
    assert painted.shape == (1, 3, 4, 4)
    assert painted[0, 0].flatten().tolist() == pytest.approx([wanted] * 16)
    assert painted[0, 1].flatten().tolist() == pytest.approx([-wanted] * 16)


def test_half_transparent_paint_is_half_of_both() -> None:
    painted = paint(rgba(255, 51), torch.tensor([[0, 0, 100]]))
    assert painted[0, 0, 0, 0].item() == pytest.approx(51 / 127.5 - 1, abs=1e-5)
    assert painted[0, 2, 0, 0].item() == pytest.approx(80 / 127.5 - 1, abs=1e-5)


def test_mirror_flips_the_chosen_only() -> None:
    images = torch.arange(2 * 4 * 2 * 3).view(2, 4, 2, 3)
    flipped = mirror(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])


def test_shrink_does_not_bleed_transparent_colours() -> None:
    image = rgba(255, 255)
    image[:, :3, :, 1::2] = 0  # every second column is black, and transparent
    image[:, 3, :, 1::2] = 0
    small = shrink(image, 2)
    assert small.shape == (1, 4, 2, 2)
    assert small.dtype == torch.uint8
    assert small[0, 0].flatten().tolist() == [255] * 4
    assert small[0, 3].flatten().tolist() == [128] * 4


def test_shrink_to_the_same_size_changes_nothing() -> None:
    image = rgba(10, 20)
    assert shrink(image, 4) is image


def test_artwork_tensor_puts_channels_first(artwork: Artwork) -> None:
    tensor = artwork_tensor(artwork)
    assert tensor.shape == (len(artwork), 4, 32, 32)
    assert tensor[2, 1, 5, 9].item() == artwork.pixels[2, 5, 9, 1]


def test_to_image_clamps_and_scales() -> None:
    image = to_image(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_sheets_have_rows_and_gaps(tmp_path: Path) -> None:
    sheet = tile([Image.new("RGB", (8, 8), "red")] * 5, columns=3)
    assert sheet.size == (3 * 10 - 2, 2 * 10 - 2)
    save_grid(torch.zeros(5, 3, 8, 8), tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.size == sheet.size
