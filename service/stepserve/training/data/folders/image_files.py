"""Image files of a training: upright RGB pixels, whatever the file's mode, within a limit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stepserve.config import UploadSettings

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = UploadSettings().max_pixels
"""Of one image, as the service has it for uploads: known before it is decoded."""
MIN_SIDE_PX = 8
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
PLAIN_MODES = ("RGB", "L", "1")
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
WITH_COLOURS = ("P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX")


class UnusableImageError(Exception):
    """The file cannot be used; the message says why."""


@dataclass(frozen=True)
class DecodedImage:
    """Upright RGB pixels, and what had to be done for them."""

    image: Image.Image
    conversions: tuple[str, ...]


def decode(path: Path) -> DecodedImage:
    """Read a file whole, so that what is wrong with it shows now.

    Raises:
        UnusableImageError: it is no image, damaged, too large, too small, or of a mode whose range
            of values is unknown.
    """
    try:
        return _decode(path)
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"not an image (known: {', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImageError(f"more than the limit of {MAX_PIXELS} pixels") from error
    # Decoders raise all of these for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
        raise UnusableImageError(f"cannot be read: {error}") from error


def _decode(path: Path) -> DecodedImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as opened:
            _check_size(opened)
            frames = getattr(opened, "n_frames", 1)
            opened.load()
            conversions = [f"first of {frames} frames"] if frames > 1 else []
            if opened.mode not in PLAIN_MODES:
                conversions.append(_describe(opened.mode))
            return DecodedImage(_to_rgb(ImageOps.exif_transpose(opened)), tuple(conversions))


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"{width}x{height} is more than the limit of {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE_PX:
        raise UnusableImageError(f"{width}x{height} px, and each side needs {MIN_SIDE_PX} px")


def _describe(mode: str) -> str:
    if mode in SIXTEEN_BITS:
        return "16-bit to 8-bit"
    if mode in WITH_ALPHA:
        return f"{mode} laid over white"
    if mode in WITH_COLOURS:
        return f"{mode} to RGB"
    raise UnusableImageError(f"mode {mode} has no known range of values")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
