from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import FORMATS
from stepserve.domain.tasks import Task
from stepserve.pipelines.requests.inputs import MAX_PIXELS, decode_inputs
from tiny_model import a_request


def file_of(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and ends where its image should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


def refusal(**files: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        decode_inputs(a_request(task=Task.INPAINTING, **files))
    return refused.value


def test_without_files_there_are_no_images() -> None:
    inputs = decode_inputs(a_request())
    assert (inputs.images, inputs.mask) == ((), None)


@pytest.mark.parametrize("file_format", FORMATS)
def test_images_get_the_size_and_colours_that_pipelines_take(file_format: str) -> None:
    file = file_of(Image.new("RGB", (100, 40), (200, 30, 40)), file_format)
    inputs = decode_inputs(a_request(images=(file,), mask=file, width=64, height=48))
    assert inputs.mask is not None
    assert (inputs.images[0].mode, inputs.images[0].size) == ("RGB", (64, 48))
    assert (inputs.mask.mode, inputs.mask.size) == ("L", (64, 48))
    red, green, blue = cast("tuple[int, ...]", inputs.images[0].getpixel((5, 5)))
    assert red > 190
    assert max(green, blue) < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16"])
def test_any_kind_of_pixel_is_taken(mode: str) -> None:
    inputs = decode_inputs(a_request(images=(file_of(Image.new(mode, (64, 64))),)))
    assert inputs.images[0].mode == "RGB"


def test_a_image_of_the_right_size_keeps_every_pixel() -> None:
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    inputs = decode_inputs(a_request(images=(file_of(image),)))
    assert inputs.images[0].tobytes() == image.tobytes()


def test_photos_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 64, 32))
    inputs = decode_inputs(a_request(images=(file_of(image, "JPEG", exif=exif),)))
    assert inputs.images[0].getpixel((60, 60))[0] > 200
    assert inputs.images[0].getpixel((4, 4))[0] < 50


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"no image",
        png_header(64, 64),
        file_of(Image.new("RGB", (64, 64)), "JPEG")[:300],
        file_of(Image.effect_noise((64, 64), 50))[:1000],
        file_of(Image.new("RGB", (8, 8)), "BMP"),
        file_of(Image.new("RGB", (8, 8)), "TIFF"),
    ],
    ids=["empty", "text", "header only", "cut jpeg", "cut png", "bmp", "tiff"],
)
def test_what_cannot_be_read_is_refused_by_name(field: str, file: bytes) -> None:
    fine = file_of(Image.new("L", (64, 64), 255))
    files: dict[str, Any] = {"images": (fine,), "mask": file}
    error = refusal(**(files if field == "mask" else {"images": (file,)}))
    assert error.field == field
    assert error.message == (
        f"{field} of {len(file)} bytes cannot be read as an image (known: PNG, JPEG, WEBP)"
    )


@pytest.mark.parametrize("side", [4097, 10_000, 100_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    error = refusal(images=(png_header(side, side) + bytes(1004),))
    assert error.field == "image"
    assert f"{MAX_PIXELS}" in error.message


def plain(mode: str = "RGB", color: Any = "red", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new(mode, size, color)


def decoded(file: bytes, side: int = 64) -> Image.Image:
    image = decode_inputs(a_request(images=(file,), width=side, height=side)).images[0]
    assert image is not None
    return image


def decoded_mask(mask: bytes) -> Image.Image:
    request = a_request(task=Task.INPAINTING, images=(file_of(plain()),), mask=mask)
    decoded = decode_inputs(replace(request, width=64, height=64)).mask
    assert decoded is not None
    return decoded


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (plain("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
        (plain("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
        (plain("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
        (plain("LA", (0, 0)), (255, 255, 255)),
        (plain("L", 90), (90, 90, 90)),
        (plain("1", 1), (255, 255, 255)),
        (plain("I;16", 0x8000), (128, 128, 128)),
        (plain("RGB", "red").quantize(4), (255, 0, 0)),
    ],
)
def test_every_kind_of_png_is_seen_as_it_looks(
    image: Image.Image, seen: tuple[int, int, int]
) -> None:
    assert decoded(file_of(image)).getpixel((0, 0)) == seen


@pytest.mark.parametrize(
    ("image", "transparent"), [(plain().quantize(4), 0), (plain(), (255, 0, 0))]
)
def test_transparency_by_colour_is_laid_on_white(image: Image.Image, transparent: Any) -> None:
    assert decoded(file_of(image, transparency=transparent)).getpixel((0, 0)) == (255, 255, 255)


def test_print_colours_are_converted() -> None:
    file = file_of(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = cast("tuple[int, ...]", decoded(file).getpixel((0, 0)))

    assert (red > 240, green < 15, blue < 15) == (True, True, True)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_moving_images_the_first_is_taken(kind: str) -> None:
    frames = [plain(color=color) for color in ("blue", "red")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)

    assert decoded(file).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_images_are_turned_upright(kind: str, orientation: int) -> None:
    marked = plain(color="white", size=(64, 64))
    marked.paste("black", (0, 0, 32, 16))
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turned |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = marked
    if orientation > 1:
        stored = marked.transpose(Image.Transpose[turned[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_kind: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    options = by_kind.get(kind, {})
    seen = decoded(file_of(stored, kind, exif=exif, **options)).convert("L")

    assert seen.point(lambda value: 255 * (value > 127)).tobytes() == marked.convert("L").tobytes()


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (plain("RGBA", (0, 0, 0, 0)), 255),
        (plain("RGBA", (255, 255, 255, 254)), 1),
        (plain("RGBA", (255, 255, 255, 255)), 255),
        (plain("LA", (255, 0)), 255),
        (plain("L", 200), 200),
        (plain("RGB", "white"), 255),
        (plain("1", 1), 255),
        (plain("I;16", 0xFFFF), 255),
    ],
)
def test_white_is_repainted(image: Image.Image, seen: int) -> None:
    mask = decoded_mask(file_of(image))

    assert (mask.mode, mask.getpixel((0, 0))) == ("L", seen)


@pytest.mark.parametrize("mask", [plain("RGBA", (0, 0, 0, 255)), plain(color="black")])
def test_a_mask_that_marks_nothing_is_a_mistake(mask: Image.Image) -> None:
    error = refusal(images=(file_of(plain()),), mask=file_of(mask))

    assert error.field == "mask"
    assert "marks nothing to repaint" in error.message


def test_metadata_that_decoders_choke_on_is_not_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 70_000_000, zip=True)
    info.add_itxt("more", "x" * 2_000_000, zip=True)
    file = file_of(plain(), pnginfo=info, icc_profile=bytes(2_000_000))
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(file))

    assert decoded(file).getpixel((0, 0)) == (255, 0, 0)


@given(st.binary(max_size=200), st.sampled_from(FORMATS), st.data())
def test_whatever_is_sent_is_a_image_or_told_to_be_none(
    content: bytes, kind: str, data: st.DataObject
) -> None:
    file = bytearray(file_of(plain(size=(8, 6)), kind))
    position = data.draw(st.integers(0, len(file)))
    file[position : position + len(content)] = content
    request = a_request(task=Task.INPAINTING, images=(bytes(file),), mask=bytes(file))
    with contextlib.suppress(InvalidRequestError):
        inputs = decode_inputs(request)
        assert inputs.images[0].mode == "RGB"
