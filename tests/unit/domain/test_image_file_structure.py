"""Image files by their structure: what they say, and what is left of them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.jpeg import MOST_SCANS
from stepserve.domain.image_files.parts import MOST_PARTS
from stepserve.domain.image_files.structure import FORMATS, ImageFile, read_image_file

SIZE = (24, 16)
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    chance = random.Random(0)
    return Image.frombytes("RGB", size, chance.randbytes(size[0] * size[1] * 3)).convert(mode)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=FORMATS)


def upright(file: bytes) -> bytes:
    return ImageOps.exif_transpose(opened(file)).tobytes()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010F] = "Camera maker"
    return exif


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG file with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk(kind, content) + png[at:]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG file with one more segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + jpeg[2:]


def read(file: bytes) -> ImageFile:
    return read_image_file(file, "image")


def refusal(file: bytes) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        read(file)
    assert refused.value.field == "image"
    return refused.value.message


MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k, modes in MODES.items() for m in modes])
def test_pixels_are_the_same_without_metadata(kind: str, mode: str):
    file = file_of(noise("L").convert(mode) if mode == "I;16" else noise(mode), kind)
    found = read(file)

    assert (found.width, found.height) == SIZE
    kept, sent = opened(found.content), opened(file)
    assert (kept.mode, kept.format) == (sent.mode, kind)
    assert kept.convert("RGBA").tobytes() == sent.convert("RGBA").tobytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_of_metadata_the_orientation_alone_is_kept(kind: str, orientation: int):
    file = file_of(noise(), kind, exif=exif_of(orientation), icc_profile=b"profile" * 99)
    found = read(file)

    assert upright(found.content) == upright(file)
    assert (found.width, found.height) == (SIZE if orientation < 5 else SIZE[::-1])
    assert dict(opened(found.content).getexif()) in ({}, {ORIENTATION: orientation})
    for word in (b"Camera", b"profile"):
        assert word not in found.content


@pytest.mark.parametrize("kind", FORMATS)
def test_an_orientation_in_xmp_counts_where_exif_has_none(kind: str):
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", (XMP % 6).decode(), zip=True)
        file = file_of(noise(), kind, pnginfo=info)
    else:
        file = file_of(noise(), kind, xmp=XMP % 6)

    assert upright(read(file).content) == upright(file) != opened(file).tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_an_orientation_in_a_raw_profile_counts(packed: bool):
    raw = exif_of(8).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=packed)
    file = file_of(noise(), "PNG", pnginfo=info)

    assert upright(read(file).content) == upright(file) != opened(file).tobytes()


BROKEN_EXIF = [
    b"",
    b"Exif\0\0",
    b"II*\0\xff\xff\xff\xff",
    b"MM\0*\0\0\0\x08\xff\xff",
    b"x" * 60_000,
]
MUCH = zlib.compress(bytes(70_000_000))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"comment\0\0" + MUCH),
        (b"iTXt", b"comment\0\1\0\0\0" + MUCH),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MUCH),
        (b"zTXt", b"Raw profile type exif\0\0" + MUCH),
        (b"iTXt", b"broken"),
        (b"zTXt", b"broken\0\0no zlib"),
        (b"iCCP", b"profile\0\0" + MUCH),
        (b"iCCP", b"profile\0\0no zlib"),
        (b"tEXt", b"comment\0" + b"x" * 2_000_000),
        (b"pHYs", b""),
        (b"acTL", b""),
        (b"gAMA", b"x"),
        *((b"eXIf", exif) for exif in BROKEN_EXIF),
    ],
)
def test_no_metadata_of_a_png_decides_whether_it_is_taken(kind: bytes, content: bytes):
    plain = file_of(noise(), "PNG")
    found = read(with_chunk(plain, kind, content))

    assert opened(found.content).tobytes() == noise().tobytes()
    assert len(found.content) <= len(plain)


@pytest.mark.parametrize("name", [b"iCCP", b"pHYs"])
def test_a_wrong_checksum_of_metadata_is_nobodys_business(name: bytes):
    file = bytearray(with_chunk(file_of(noise(), "PNG"), name, b"x" * 9))
    file[file.index(name) + 4 + 9] ^= 0xFF

    assert opened(read(bytes(file)).content).tobytes() == noise().tobytes()


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        *((0xE1, b"Exif\0\0" + exif) for exif in BROKEN_EXIF),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0not xml"),
        (0xE2, b"ICC_PROFILE\0\x05\x01no profile"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
        (0xEC, b"Ducky"),
        (0xFE, b"a comment" * 1000),
    ],
)
def test_no_metadata_of_a_jpeg_decides_whether_it_is_taken(marker: int, content: bytes):
    plain = file_of(noise(), "JPEG")
    found = read(with_segment(plain, marker, content))

    assert found.content == read(plain).content
    assert opened(found.content).tobytes() == opened(plain).tobytes()


def test_of_two_images_in_one_jpeg_the_first_is_taken():
    file = file_of(noise(), "MPO", save_all=True, append_images=[noise("L").convert("RGB")])
    found = read(file)

    assert opened(found.content).format == "JPEG"
    assert opened(found.content).tobytes() == opened(file_of(noise(), "JPEG")).tobytes()


def test_print_colours_keep_what_says_which_they_are():
    file = file_of(noise("CMYK"), "JPEG")
    assert b"Adobe" in file

    assert opened(read(file).content).tobytes() == opened(file).tobytes()


@pytest.mark.parametrize("exif", BROKEN_EXIF[1:])
def test_no_metadata_of_a_webp_decides_whether_it_is_taken(exif: bytes):
    options = {"icc_profile": b"none", "xmp": b"not xml", "lossless": True}
    found = read(file_of(noise(), "WEBP", exif=exif, **options))

    assert opened(found.content).tobytes() == noise().tobytes()
    assert not {"exif", "xmp", "icc_profile"} & opened(found.content).info.keys()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_moving_images_the_first_is_taken(kind: str):
    frames = [Image.new("RGB", SIZE, color) for color in ("blue", "red")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)

    assert opened(read(file).content).convert("RGB").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("cut", [1, 4, 9, 12, 20, 30])
def test_files_that_end_in_their_header_are_refused(kind: str, cut: int):
    assert "cannot be read as an image" in refusal(file_of(noise(), kind)[:cut])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_files_that_end_in_their_pixels_are_refused_undecoded(kind: str):
    file = file_of(noise(), kind)
    assert "cannot be read as an image" in refusal(file[: len(file) // 2])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(kind: str):
    assert "(known: PNG, JPEG, WEBP)" in refusal(file_of(noise(), kind))


def test_a_png_without_its_end_is_as_good_as_one_with_it():
    file = file_of(noise(), "PNG")
    assert read(file[:-12]).content == read(file).content == read(file + b"more").content


def test_sizes_are_told_however_large_they_are():
    header = struct.pack(">IIBBBBB", 2**31 - 1, 70_000, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    found = read(file)

    assert (found.width, found.height) == (2**31 - 1, 70_000)


def test_files_of_very_many_parts_are_refused():
    png = file_of(noise(), "PNG")
    at = png.index(b"IDAT") - 4
    assert read(png[:at] + chunk(b"teSt", b"") * 1000 + png[at:]).width == SIZE[0]
    assert "cannot be read" in refusal(png[:at] + chunk(b"teSt", b"") * MOST_PARTS + png[at:])
    jpeg = file_of(noise(), "JPEG")
    assert read(jpeg[:2] + b"\xff\xfe\0\2" * 1000 + jpeg[2:]).width == SIZE[0]
    assert "cannot be read" in refusal(jpeg[:2] + b"\xff\xfe\0\2" * MOST_PARTS + jpeg[2:])


def test_a_jpeg_of_very_many_scans_is_refused():
    file = file_of(noise(), "JPEG", progressive=True)
    scan = file[file.rindex(b"\xff\xda") : -2]
    assert read(file).width == SIZE[0]
    assert "cannot be read" in refusal(file[:-2] + scan * MOST_SCANS + file[-2:])


@given(st.binary(max_size=60), st.sampled_from(FORMATS), st.data())
def test_whatever_is_sent_is_read_or_refused(content: bytes, kind: str, data: st.DataObject):
    file = bytearray(file_of(noise(), kind, exif=exif_of(6)))
    position = data.draw(st.integers(0, len(file)))
    file[position : position + len(content)] = content
    try:
        found = read(bytes(file))
    except InvalidRequestError:
        return
    assert found.width > 0
    assert found.height > 0
    # To read what is left changes nothing more.
    assert read(found.content) == found
