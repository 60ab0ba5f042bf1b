"""The structure of WEBP files: a RIFF header, then chunks of kind, length and padded content."""

from __future__ import annotations

import struct

from stepserve.domain.image_files.orientation import (
    UPRIGHT,
    exif_with,
    orientation_in_exif,
    orientation_in_xmp,
)
from stepserve.domain.image_files.parts import Found, MalformedFileError, Reader, check

SIGNATURE = b"RIFF"

HEADER_BYTES = 12
LOSSY, LOSSLESS, EXTENDED = b"VP8 ", b"VP8L", b"VP8X"
PIXELS = (LOSSY, LOSSLESS, b"ALPH", b"ANIM", b"ANMF")
EXIF, XMP = b"EXIF", b"XMP "
EXIF_FLAG = 0x08
METADATA_FLAGS = 0x20 | EXIF_FLAG | 0x04
"""Of the extended header: there is a colour profile, EXIF, XMP."""

LOSSY_START = b"\x9d\x01\x2a"
LOSSLESS_START = 0x2F


def read(file: bytes) -> Found:
    """Return what the chunks of a WEBP file say.

    Raises:
        MalformedFileError: it is another kind of RIFF file, has no pixels, or is cut short.
    """
    reader = Reader(file, 4)
    end = reader.number("<I") + 8
    check(reader.take(4) == b"WEBP", "it is no WEBP file")
    kind, content = _next_chunk(reader)
    size = _size(kind, content)
    if kind != EXTENDED:
        return Found(*size, _file([_chunk(kind, content)]))
    return _extended(size, content, _chunks(reader, end))


def _extended(size: tuple[int, int], header: bytes, chunks: list[tuple[bytes, bytes]]) -> Found:
    exif = [orientation_in_exif(content) for kind, content in chunks if kind == EXIF]
    xmp = [orientation_in_xmp(content) for kind, content in chunks if kind == XMP]
    pixels = [_chunk(kind, content) for kind, content in chunks if kind in PIXELS]
    check(bool(pixels), "it has no pixels")
    orientation = next(filter(None, exif + xmp), UPRIGHT)
    flags = header[0] & ~METADATA_FLAGS
    if orientation != UPRIGHT:
        flags |= EXIF_FLAG
        pixels.append(_chunk(EXIF, exif_with(orientation)))
    first = _chunk(EXTENDED, bytes((flags,)) + header[1:])
    return Found(*size, _file([first, *pixels]), orientation)


def _chunks(reader: Reader, end: int) -> list[tuple[bytes, bytes]]:
    """What follows up to the end that the header says; less than a chunk's beginning is padding."""
    chunks = []
    while reader.left_bytes >= 8 and reader.position + 8 <= end:
        chunks.append(_next_chunk(reader))
    return chunks


def _next_chunk(reader: Reader) -> tuple[bytes, bytes]:
    reader.begin_part()
    kind, length = reader.take(4), reader.number("<I")
    content = reader.take(length)
    reader.take(min(length % 2, reader.left_bytes))
    return kind, content


def _size(kind: bytes, content: bytes) -> tuple[int, int]:
    check(len(content) >= 10, "its header is cut short")
    match kind:
        case b"VP8 ":
            check(content[3:6] == LOSSY_START, "its pixels do not begin")
            width, height = struct.unpack_from("<HH", content, 6)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            check(content[0] == LOSSLESS_START, "its pixels do not begin")
            (bits,) = struct.unpack_from("<I", content, 1)
            return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
        case b"VP8X":
            return _number(content[4:7]) + 1, _number(content[7:10]) + 1
    raise MalformedFileError("it begins with no pixels")


def _number(three: bytes) -> int:
    return int.from_bytes(three, "little")


def _file(chunks: list[bytes]) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return SIGNATURE + struct.pack("<I", len(body)) + body


def _chunk(kind: bytes, content: bytes) -> bytes:
    padding = b"\0" * (len(content) % 2)
    return kind + struct.pack("<I", len(content)) + content + padding
