"""What requests of instruction edits bring along: one, two or three images each."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .family import Variation
from .image_transformer_parts import SIZE

REQUESTS = 6
"""Two with as many images each, so that they can share forwards."""
LEAST_SHARING = 1.5
"""Of 19 calls in 12 forwards, which is the most: requests with other numbers of images wait."""


def reference_images(variation: Variation, side_px: int = SIZE) -> list[Image.Image]:
    """One, two or three of its own, in turn, each of about one colour."""
    count = 1 + variation.index % 3
    noise = variation.tensor(count, side_px, side_px, 3)
    values = 0.7 * noise[:, :1, :1] + 0.3 * noise
    return [Image.fromarray(image) for image in (255 * values.numpy()).astype(np.uint8)]


def first_image(variation: Variation, side_px: int = SIZE) -> Image.Image:
    """For pipelines that take one only."""
    return reference_images(variation, side_px)[0]


def mask_image(variation: Variation, side_px: int = SIZE) -> Image.Image:
    """White where an image is to be painted anew: its right half."""
    mask = np.zeros((side_px, side_px), np.uint8)
    mask[:, side_px // 2 :] = 255
    return Image.fromarray(mask)
