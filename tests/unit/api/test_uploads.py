"""Pictures from outside: what is refused before it is decoded, and what is left of the others."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from service.api.uploads import UploadLimits, prepare_image, prepare_mask
from service.domain.errors import InvalidRequestError

LIMITS = UploadLimits(max_bytes=100_000, max_pixels=40_000)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode: str = "RGB", color: Any = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def refusal(file: bytes, limits: UploadLimits = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        prepare_image(file, "image", limits)
    assert refused.value.field == "image"
    return refused.value.message


def chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says how large it is, and has hardly anything in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_known_formats_become_png(kind: str):
    upload = prepare_image(file_of(plain(), kind), "image", LIMITS)
    image = opened(upload.file)

    assert (upload.width, upload.height) == image.size == (8, 6)
    assert (image.format, image.mode) == ("PNG", "RGB")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused_whatever_they_are_called(kind: str):
    assert "cannot be read as a picture (known: PNG, JPEG, WEBP)" in refusal(file_of(plain(), kind))


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((201, 200), "is 201x200 pixels; the limit is 40000 pixels"),
        ((20_000, 20_000), "pixels; the limit is 40000 pixels"),
        ((2**31 - 1, 2**31 - 1), "pixels; the limit is 40000 pixels"),
    ],
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_too_many_pixels_are_told_before_any_is_decoded(
    size: tuple[int, int], told: str, action: Any
):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert told in refusal(png_header(*size))


def test_the_limits_themselves_are_allowed():
    assert prepare_image(file_of(plain(size=(200, 200))), "image", LIMITS).width == 200
    file = file_of(plain())
    assert prepare_image(file, "image", UploadLimits(max_bytes=len(file))).width == 8
    message = refusal(file, UploadLimits(max_bytes=len(file) - 1))
    assert message == f"image is {len(file)} bytes long; the limit is {len(file) - 1} bytes"


def test_text_that_unpacks_to_very_much_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 70_000_000, zip=True)
    file = file_of(plain(), pnginfo=info)

    assert len(file) < 100_000
    assert "cannot be read as a picture" in refusal(file)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_files_that_are_cut_short_are_refused(kind: str, share: float):
    noise = Image.effect_noise((100, 100), 80).convert("RGB")
    file = file_of(noise, kind)

    assert "cannot be read as a picture" in refusal(file[: int(len(file) * share)])


@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
@example(b"", "PNG", None)
def test_whatever_is_sent_is_a_picture_or_told_to_be_none(
    content: bytes, kind: str, data: st.DataObject | None
):
    file = bytearray(file_of(plain(), kind))
    position = data.draw(st.integers(0, len(file))) if data else 0
    file[position : position + len(content)] = content
    for prepare in (prepare_image, prepare_mask):
        with contextlib.suppress(InvalidRequestError):
            upload = prepare(bytes(file), "image", LIMITS)
            assert opened(upload.file).size == (upload.width, upload.height)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int):
    marked = plain(color="white", size=(16, 8))
    marked.paste("black", (0, 0, 4, 4))
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turned |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = marked
    if orientation > 1:
        stored = marked.transpose(Image.Transpose[turned[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upload = prepare_image(file_of(stored, exif=exif), "image", LIMITS)

    assert opened(upload.file).tobytes() == marked.tobytes()


def test_only_pixels_are_left():
    exif = Image.Exif()
    exif[0x010F] = "Camera maker"
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "Somebody")
    options: dict[str, Any] = {
        "exif": exif,
        "pnginfo": info,
        "dpi": (300, 300),
        "icc_profile": b"x",
    }
    file = prepare_image(file_of(plain(), **options), "image", LIMITS).file

    assert not opened(file).info
    for word in (b"Camera", b"Somebody", b"iCCP", b"eXIf", b"pHYs", b"tEXt"):
        assert word not in file


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
def test_every_kind_of_png_is_seen_as_it_looks(image: Image.Image, seen: tuple[int, int, int]):
    assert opened(prepare_image(file_of(image), "image", LIMITS).file).getpixel((0, 0)) == seen


@pytest.mark.parametrize(
    ("image", "transparent"), [(plain().quantize(4), 0), (plain(), (255, 0, 0))]
)
def test_transparency_by_colour_is_laid_on_white(image: Image.Image, transparent: Any):
    file = file_of(image, transparency=transparent)

    assert opened(prepare_image(file, "image", LIMITS).file).getpixel((0, 0)) == (255, 255, 255)


def test_print_colours_are_converted():
    file = file_of(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = opened(prepare_image(file, "image", LIMITS).file).getpixel((0, 0))

    assert (red > 240, green < 15, blue < 15) == (True, True, True)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_moving_pictures_the_first_is_taken(kind: str):
    frames = [plain(color=color) for color in ("blue", "red")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)

    assert opened(file).n_frames == 2
    assert opened(prepare_image(file, "image", LIMITS).file).getpixel((0, 0)) == (0, 0, 255)


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
def test_white_is_repainted(image: Image.Image, seen: int):
    mask = opened(prepare_mask(file_of(image), "mask", LIMITS).file)

    assert (mask.mode, mask.getpixel((0, 0))) == ("L", seen)
