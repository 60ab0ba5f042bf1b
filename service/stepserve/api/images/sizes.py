"""The size of an image that is made of another one."""

from __future__ import annotations

import math
from itertools import product

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile
from stepserve.domain.models import ModelCapabilities, SizeRange

AREA_WEIGHT = 0.25
"""What an area counts that is too large or small, over a shape that is as wrong."""


def upscaled_size(image: ImageFile, asked: str | None, model: ModelCapabilities) -> tuple[int, int]:
    """Return the size of the upscaled image, in steps that the model takes.

    Raises:
        InvalidRequestError: the image is too small or too large, or another size was asked for.
    """
    factor, sizes = model.upscale_factor, model.sizes
    larger = image.width * factor, image.height * factor
    if not all(sizes.accepts(sizes.nearest(side)) for side in larger):
        raise InvalidRequestError(
            f"image is {image.width}x{image.height} pixels: each side must be "
            f"{sizes.minimum // factor} to {sizes.maximum // factor} for model {model.id!r}, which "
            f"makes it {factor} times as large",
            "image",
        )
    width, height = _likest(*larger, sizes, reach=1)
    if asked not in (None, "auto", f"{width}x{height}"):
        raise InvalidRequestError(
            f"size {asked} must be left out: model {model.id!r} makes {width}x{height} of the "
            f"image, which is {factor} times as large",
            "size",
        )
    return width, height


def nearest_size(width: int, height: int, sizes: SizeRange) -> tuple[int, int]:
    """Return the size that an image of `width` x `height` is best served in.

    Its own if the model has it; else about as many pixels as the native size has, in the shape that
    is nearest to the image's.
    """
    if sizes.accepts(width) and sizes.accepts(height):
        return width, height
    scale = sizes.native / (width * height) ** 0.5
    return _likest(width * scale, height * scale, sizes, reach=2)


def _likest(width_px: float, height_px: float, sizes: SizeRange, reach: int) -> tuple[int, int]:
    """The size of the model that is most like one that it may not have, above all in its shape.

    Args:
        width_px: of the one.
        height_px: of the one.
        sizes: of the model.
        reach: how many of the next larger sides and of the next smaller ones are looked at.
    """

    def unlikeness(size: tuple[int, int]) -> float:
        wider, higher = math.log(size[0] / width_px), math.log(size[1] / height_px)
        return abs(wider - higher) + AREA_WEIGHT * abs(wider + higher)

    widths, heights = (_sides_near(side, sizes, reach) for side in (width_px, height_px))
    return min(product(widths, heights), key=unlikeness)


def _sides_near(side_px: float, sizes: SizeRange, reach: int) -> list[int]:
    """The sides of the model next to one: `reach` below it and as many above it."""
    most = (sizes.maximum - sizes.minimum) // sizes.step
    steps = math.floor((side_px - sizes.minimum) / sizes.step)
    around = range(steps + 1 - reach, steps + 1 + reach)
    return sorted({sizes.minimum + min(max(step, 0), most) * sizes.step for step in around})
