"""Images from outside: what is refused before anything is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import pytest
from PIL import Image
from stepserve.api.inputs.uploads import read_upload
from stepserve.config import UploadSettings
from stepserve.domain.errors import InvalidRequestError

LIMITS = UploadSettings(max_bytes=100_000, max_pixels=40_000)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, "red")


def refusal(file: bytes, limits: UploadSettings = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        read_upload(file, "image", limits)
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
def test_a_file_is_passed_on_with_its_size(kind: str):
    upload = read_upload(file_of(plain(), kind), "image", LIMITS)

    assert (upload.width, upload.height) == (8, 6)
    assert Image.open(io.BytesIO(upload.content)).format == kind


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused_whatever_they_are_called(kind: str):
    assert "cannot be read as an image (known: PNG, JPEG, WEBP)" in refusal(file_of(plain(), kind))


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((201, 200), "is 201x200 pixels; the limit is 40000 pixels"),
        ((20_000, 20_000), "is 20000x20000 pixels; the limit is 40000 pixels"),
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
    assert read_upload(file_of(plain((200, 200))), "image", LIMITS).width == 200
    file = file_of(plain())
    assert read_upload(file, "image", UploadSettings(max_bytes=len(file))).width == 8
    message = refusal(file, UploadSettings(max_bytes=len(file) - 1))
    assert message == f"image is {len(file)} bytes long; the limit is {len(file) - 1} bytes"


def test_a_small_file_of_many_pixels_is_not_unfolded(monkeypatch: pytest.MonkeyPatch):
    file = file_of(Image.new("L", (4096, 4096)))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded"))
    upload = read_upload(file, "image", UploadSettings())

    assert len(upload.content) <= len(file) < 30_000
