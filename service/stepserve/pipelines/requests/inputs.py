"""The images that a request brings along: decoded, made safe, and made to fit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import FORMATS, read_image_file, unreadable
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.controls.preprocessors import preprocess

MAX_PIXELS = 4096 * 4096
OPAQUE = 255


@dataclass(frozen=True)
class InputImages:
    """What a request brings along, decoded: RGB images, and a grey mask or None.

    `enlarged_controls` are the controls in the size that the image is enlarged to, if it is.
    """

    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    controls: tuple[Image.Image, ...] = ()
    references: tuple[Image.Image, ...] = ()
    enlarged_controls: tuple[Image.Image, ...] = ()


def decode_inputs(
    request: GenerationRequest, is_fitted: bool = True, factor: int = 1
) -> InputImages:
    """Decode the images of a request.

    Controls are resized to the size that it asks for, and so are images and mask if they are to be
    `is_fitted`, to a `factor` less where they are upscaled. References keep their size. Controls
    are preprocessed as the request says.

    Transparent parts of the image become white. In the mask white is to be repainted: in OpenAI's
    masks that is what is transparent; in a mask without transparency, as diffusers has them, it is
    what is white. Takes up to a second an image: not for an event loop.

    Raises:
        InvalidRequestError: names the field whose file cannot be read, has too many pixels, or
            marks nothing to repaint.
    """
    fitted = (request.width // factor, request.height // factor) if is_fitted else None
    return InputImages(
        images=tuple(_decode("image", file, fitted, _on_white) for file in request.images),
        mask=None if request.mask is None else _decode("mask", request.mask, fitted, _mask_of),
        controls=_controls_of(request),
        references=tuple(
            _decode(f"references[{index}].image", use.image, None, _on_white)
            for index, use in enumerate(request.references)
        ),
        enlarged_controls=_controls_of(request.phases[-1]) if request.hires else (),
    )


def _controls_of(request: GenerationRequest) -> tuple[Image.Image, ...]:
    """In the size that is asked for, preprocessed."""
    size = request.width, request.height
    return tuple(
        preprocess(_decode("controls", use.image, size, _on_white), use.preprocessor)
        for use in request.controls
    )


def _decode(
    field: str,
    file: bytes,
    size: tuple[int, int] | None,
    as_needed: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    opened = _open(field, file)
    try:
        image = as_needed(_in_8_bits(_upright(opened)))
    except InvalidRequestError:
        raise
    except Exception as error:
        # Pillow raises whatever its decoders do.
        raise unreadable(field, file) from error
    if size is None or image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS)


def _open(field: str, file: bytes) -> Image.Image:
    """Only the header is read, and no metadata: there is none left."""
    image_file = read_image_file(file, field)
    _check_pixels(field, image_file.width, image_file.height)
    try:
        opened = Image.open(io.BytesIO(image_file.content), formats=FORMATS)
    except Exception as error:
        raise unreadable(field, file) from error
    # What decoders find may differ from what the header said.
    _check_pixels(field, *opened.size)
    return opened


def _check_pixels(field: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{field} is {width}x{height} pixels and the limit is {MAX_PIXELS} pixels", field
        )


def _upright(opened: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(opened, in_place=True)
    return opened


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits would be cut off at 255 by Pillow's conversions, not scaled."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    white = Image.new("RGB", layered.size, "white")
    white.paste(layered, mask=layered.getchannel("A"))
    return white


def _mask_of(image: Image.Image) -> Image.Image:
    mask = _transparency_of(image) or image.convert("L")
    if mask.getextrema() == (0, 0):
        raise InvalidRequestError(
            "mask marks nothing to repaint: make that part transparent, or white in an image "
            "without transparency",
            "mask",
        )
    return mask


def _transparency_of(image: Image.Image) -> Image.Image | None:
    """White where the image is transparent, or None where it is nowhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (OPAQUE, OPAQUE) else ImageOps.invert(alpha)
