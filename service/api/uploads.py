"""Pictures from outside, made safe: known formats and sizes only, upright, and only pixels."""

from __future__ import annotations

import io
import warnings
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
    upright = _decode(file, field, limits)
    if upright.has_transparency_data:
        alpha = upright.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (OPAQUE, OPAQUE):
            return _as_upload(ImageOps.invert(alpha))
    return _as_upload(upright.convert("L"))


def _decode(file: bytes, field: str, limits: UploadLimits) -> Image.Image:
    if len(file) > limits.max_bytes:
        raise InvalidRequestError(
            f"{field} is {len(file)} bytes long; the limit is {limits.max_bytes} bytes", field
        )
    try:
        with warnings.catch_warnings():
            # Its own limit is another; ours is checked here, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # The content decides what it is, not the name or the declared type.
            image = Image.open(io.BytesIO(file), formats=FORMATS)
            _check_pixels(image, field, limits)
            return ImageOps.exif_transpose(image)
    except InvalidRequestError:
        raise
    except Exception as error:
        # Pillow raises whatever its decoders do.
        known = ", ".join(FORMATS)
        raise InvalidRequestError(
            f"{field} of {len(file)} bytes cannot be read as a picture (known: {known})", field
        ) from error


def _check_pixels(image: Image.Image, field: str, limits: UploadLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise InvalidRequestError(
            f"{field} is {image.width}x{image.height} pixels; the limit is "
            f"{limits.max_pixels} pixels",
            field,
        )


def _as_upload(image: Image.Image) -> Upload:
    """Only pixels are kept: where a picture was taken and by whom is nobody's business."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, "PNG", compress_level=1)
    return Upload(buffer.getvalue(), image.width, image.height)
