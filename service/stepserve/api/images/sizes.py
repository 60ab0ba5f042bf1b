"""The size of an image that is made of another one."""

from __future__ import annotations

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile
from stepserve.domain.models import ModelCapabilities, SizeRange


def upscaled_size(image: ImageFile, asked: str | None, model: ModelCapabilities) -> tuple[int, int]:
    """Return the size of the upscaled image, in steps that the model takes.

    Raises:
        InvalidRequestError: the image is too small or too large, or another size was asked for.
    """
    factor, sizes = model.upscale_factor, model.sizes
    width, height = (sizes.nearest(side * factor) for side in (image.width, image.height))
    if not (sizes.accepts(width) and sizes.accepts(height)):
        raise InvalidRequestError(
            f"image is {image.width}x{image.height} pixels: each side must be "
            f"{sizes.minimum // factor} to {sizes.maximum // factor} for model {model.id!r}, which "
            f"makes it {factor} times as large",
            "image",
        )
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
    return _nearest_side(width * scale, sizes), _nearest_side(height * scale, sizes)


def _nearest_side(side_px: float, sizes: SizeRange) -> int:
    steps = round((side_px - sizes.minimum) / sizes.step)
    most = (sizes.maximum - sizes.minimum) // sizes.step
    return sizes.minimum + min(max(steps, 0), most) * sizes.step
