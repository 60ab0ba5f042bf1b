from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image
from tiny_model import a_request

from service.domain.errors import InvalidRequestError
from service.domain.image_files import FORMATS
from service.domain.requests import Task
from service.pipelines.inputs import MAX_PIXELS, decode_inputs


def file_of(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and ends where its picture should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


def refusal(**files: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        decode_inputs(a_request(task=Task.INPAINTING, **files))
    return refused.value


def test_without_files_there_are_no_pictures() -> None:
    inputs = decode_inputs(a_request())
    assert (inputs.image, inputs.mask_image) == (None, None)


@pytest.mark.parametrize("file_format", FORMATS)
def test_pictures_get_the_size_and_colours_that_pipelines_take(file_format: str) -> None:
    file = file_of(Image.new("RGB", (100, 40), (200, 30, 40)), file_format)
    inputs = decode_inputs(a_request(image=file, mask_image=file, width=64, height=48))
    assert inputs.image is not None
    assert inputs.mask_image is not None
    assert (inputs.image.mode, inputs.image.size) == ("RGB", (64, 48))
    assert (inputs.mask_image.mode, inputs.mask_image.size) == ("L", (64, 48))
    red, green, blue = inputs.image.getpixel((5, 5))
    assert red > 190
    assert max(green, blue) < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16"])
def test_any_kind_of_pixel_is_taken(mode: str) -> None:
    inputs = decode_inputs(a_request(image=file_of(Image.new(mode, (64, 64)))))
    assert inputs.image is not None
    assert inputs.image.mode == "RGB"


def test_a_picture_of_the_right_size_keeps_every_pixel() -> None:
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    inputs = decode_inputs(a_request(image=file_of(image)))
    assert inputs.image is not None
    assert inputs.image.tobytes() == image.tobytes()


def test_photos_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 64, 32))
    inputs = decode_inputs(a_request(image=file_of(image, "JPEG", exif=exif)))
    assert inputs.image is not None
    assert inputs.image.getpixel((60, 60))[0] > 200
    assert inputs.image.getpixel((4, 4))[0] < 50


@pytest.mark.parametrize(("field", "told"), [("image", "image"), ("mask_image", "mask")])
@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"no picture",
        png_header(64, 64),
        file_of(Image.new("RGB", (64, 64)), "JPEG")[:300],
        file_of(Image.effect_noise((64, 64), 50))[:1000],
        file_of(Image.new("RGB", (8, 8)), "BMP"),
        file_of(Image.new("RGB", (8, 8)), "TIFF"),
    ],
    ids=["empty", "text", "header only", "cut jpeg", "cut png", "bmp", "tiff"],
)
def test_what_cannot_be_read_is_refused_by_name(field: str, told: str, file: bytes) -> None:
    fine = file_of(Image.new("L", (64, 64), 255))
    error = refusal(**{"image": fine, field: file})
    assert error.field == told
    assert error.message == (
        f"{told} of {len(file)} bytes cannot be read as a picture (known: PNG, JPEG, WEBP)"
    )


@pytest.mark.parametrize("side", [4097, 10_000, 100_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    error = refusal(image=png_header(side, side) + bytes(1004))
    assert error.field == "image"
    assert f"{MAX_PIXELS}" in error.message
