"""Pictures from outside, made safe: known formats and sizes only, upright, and only pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from service.domain.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP")
OPAQUE = 255


@dataclass(frozen=True)
class UploadLimits:
    """What is taken from outside.

    Args:
        max_bytes: of one picture file.
        max_pixels: of one picture; checked before it is decoded.
        urls: whether pictures may be fetched from `http` and `https` addresses.
        fetch_timeout_s: how long fetching one may take.
    """

    max_bytes: int = 10 * 2**20
    max_pixels: int = 4096 * 4096
    urls: bool = False
    fetch_timeout_s: float = 10.0


@dataclass(frozen=True)
class Upload:
    """A picture as a PNG file without metadata, and its size in pixels."""

    file: bytes
    width: int
    height: int


def prepare_image(file: bytes, field: str, limits: UploadLimits) -> Upload:
    """Decode a picture; transparent parts become white. Takes a while: not for an event loop.

    Raises:
        InvalidRequestError: names `field`, what is wrong with the file, and the limit.
    """
    upright = _decode(file, field, limits)
    if not upright.has_transparency_data:
        return _as_upload(upright.convert("RGB"))
    layered = upright.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return _as_upload(Image.alpha_composite(white, layered).convert("RGB"))


def prepare_mask(file: bytes, field: str, limits: UploadLimits) -> Upload:
    """Decode a mask to grey: white is to be repainted.

    In OpenAI's masks that is what is transparent; in a mask without transparency, as diffusers has
    them, it is what is white.

    Raises:
        InvalidRequestError: names `field`, what is wrong with the file, and the limit.
    """
    mask = _mask_of(_decode(file, field, limits))
    if mask.getextrema() == (0, 0):
        raise InvalidRequestError(
            f"{field} marks nothing to repaint: make that part transparent, or white in a picture "
            "without transparency",
            field,
        )
    return _as_upload(mask)


def _mask_of(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (OPAQUE, OPAQUE):
            return ImageOps.invert(alpha)
    return picture.convert("L")


def _decode(file: bytes, field: str, limits: UploadLimits) -> Image.Image:
    if len(file) > limits.max_bytes:
        raise InvalidRequestError(
            f"{field} is {len(file)} bytes long; the limit is {limits.max_bytes} bytes", field
        )
    try:
        # Reads the header only. The content decides what it is, not the name or declared type.
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(field, "far too many", limits) from error
    except Exception as error:
        raise _unreadable(field, file) from error
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(field, f"{image.width}x{image.height}", limits)
    try:
        return _in_8_bits(ImageOps.exif_transpose(image))
    except Exception as error:
        # Pillow raises whatever its decoders do.
        raise _unreadable(field, file) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits would be cut off at 255 by Pillow's conversions, not scaled."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _too_many_pixels(field: str, size: str, limits: UploadLimits) -> InvalidRequestError:
    message = f"{field} is {size} pixels; the limit is {limits.max_pixels} pixels"
    return InvalidRequestError(message, field)


def _unreadable(field: str, file: bytes) -> InvalidRequestError:
    known = ", ".join(FORMATS)
    message = f"{field} of {len(file)} bytes cannot be read as a picture (known: {known})"
    return InvalidRequestError(message, field)


def _as_upload(image: Image.Image) -> Upload:
    """Only pixels are kept: where a picture was taken and by whom is nobody's business."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, "PNG", compress_level=1)
    return Upload(buffer.getvalue(), image.width, image.height)
