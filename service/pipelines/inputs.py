"""The pictures that a request brings along: decoded, and made to fit."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from service.domain.errors import InvalidRequestError
from service.domain.requests import GenerationRequest

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class InputPictures:
    """What a request starts from, in the size of its answer: RGB picture and grey mask, or None."""

    image: Image.Image | None = None
    mask_image: Image.Image | None = None


def decode_inputs(request: GenerationRequest) -> InputPictures:
    """Decode the pictures of a request and resize them to the size that it asks for.

    Raises:
        InvalidRequestError: names the field whose file cannot be read or has too many pixels.
    """
    size = request.width, request.height
    return InputPictures(
        image=_decode("image", request.image, size, "RGB"),
        mask_image=_decode("mask_image", request.mask_image, size, "L"),
    )


def _decode(field: str, file: bytes | None, size: tuple[int, int], mode: str) -> Image.Image | None:
    if file is None:
        return None
    image = _open(field, file)
    _check_pixels(field, *image.size)
    try:
        # As diffusers does with pictures that it loads itself.
        upright = ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:
        raise _unreadable(field, file) from error
    return upright if upright.size == size else upright.resize(size, Image.Resampling.LANCZOS)


def _open(field: str, file: bytes) -> Image.Image:
    """Only the header is read."""
    try:
        return Image.open(io.BytesIO(file), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(
            f"{field} has more pixels than the limit of {MAX_PIXELS}", field
        ) from error
    except Exception as error:
        raise _unreadable(field, file) from error


def _check_pixels(field: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{field} is {width}x{height} pixels and the limit is {MAX_PIXELS} pixels", field
        )


def _unreadable(field: str, file: bytes) -> InvalidRequestError:
    known = ", ".join(FORMATS)
    message = f"{field} of {len(file)} bytes cannot be read as a picture (known: {known})"
    return InvalidRequestError(message, field)
