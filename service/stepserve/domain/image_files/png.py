"""The structure of PNG files: a signature, then chunks of length, kind, content and checksum."""

from __future__ import annotations

import struct
import zlib

from stepserve.domain.image_files.orientation import (
    UPRIGHT,
    exif_with,
    orientation_in_exif,
    orientation_in_xmp,
)
from stepserve.domain.image_files.parts import Found, MalformedFileError, Reader

SIGNATURE = b"\x89PNG\r\n\x1a\n"

HEADER, DATA, END = b"IHDR", b"IDAT", b"IEND"
PIXELS = (HEADER, b"PLTE", b"tRNS", DATA, END)
"""Kinds of chunks that decide pixels as decoders show them; colour profiles are not applied."""

HEADER_BYTES = 13
MOST_TEXT_BYTES = 2**16
"""Of compressed metadata this much is looked at for an orientation."""

XMP_KEYWORD = b"XML:com.adobe.xmp"
EXIF_KEYWORD = b"Raw profile type exif"
"""Under which ImageMagick writes EXIF as text."""


def read(file: bytes) -> Found:
    """Return what the chunks of a PNG file say.

    Raises:
        MalformedFileError: it does not begin with a header, or is cut short in its pixels.
    """
    reader = Reader(file, len(SIGNATURE))
    kept: list[bytes] = []
    orientations: list[int | None] = []
    header = b""
    while reader.left_bytes:
        chunk = _next_chunk(reader, is_first=not header)
        if chunk is None:
            break
        kind, content = chunk[4:8], chunk[8:-4]
        header = header or content
        if kind in PIXELS:
            kept.append(chunk)
        else:
            orientations.append(_orientation_in(kind, content))
        if kind == END:
            break
    return _found(header, kept, orientations)


def _next_chunk(reader: Reader, *, is_first: bool) -> bytes | None:
    """The next chunk with its length and checksum, or None if it is cut short and no pixels are."""
    reader.begin_part()
    if reader.left_bytes < 8:
        return None
    length, kind = struct.unpack(">I4s", reader.take(8))
    if is_first and (kind, length) != (HEADER, HEADER_BYTES):
        raise MalformedFileError("it does not begin with a header")
    if length + 4 > reader.left_bytes and kind not in PIXELS:
        return None
    reader.position -= 8
    return reader.take(length + 12)


def _found(header: bytes, kept: list[bytes], orientations: list[int | None]) -> Found:
    width, height = struct.unpack(">II", header[:8]) if header else (0, 0)
    if not width or not height or not any(chunk[4:8] == DATA for chunk in kept):
        raise MalformedFileError("it has no pixels")
    orientation = next(filter(None, orientations), UPRIGHT)
    if orientation != UPRIGHT:
        kept.insert(1, _chunk(b"eXIf", exif_with(orientation)))
    if kept[-1][4:8] != END:
        kept.append(_chunk(END, b""))
    return Found(width, height, b"".join([SIGNATURE, *kept]), orientation)


def _orientation_in(kind: bytes, content: bytes) -> int | None:
    match kind:
        case b"eXIf":
            return orientation_in_exif(content)
        case b"iTXt" if content.startswith(XMP_KEYWORD + b"\0"):
            return orientation_in_xmp(_international_text(content))
        case b"tEXt" | b"zTXt" if content.startswith(EXIF_KEYWORD + b"\0"):
            return orientation_in_exif(_bytes_in_hex(_text(kind, content)))
    return None


def _international_text(content: bytes) -> bytes:
    rest = content[len(XMP_KEYWORD) + 1 :]
    is_compressed = rest[:1] == b"\1"
    text = rest[2:].split(b"\0", 2)[-1]
    return _unpacked(text) if is_compressed else text


def _text(kind: bytes, content: bytes) -> bytes:
    text = content[len(EXIF_KEYWORD) + 1 :]
    return _unpacked(text[1:]) if kind == b"zTXt" else text


def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MOST_TEXT_BYTES)
    except zlib.error:
        return b""


def _bytes_in_hex(text: bytes) -> bytes:
    """What is written in hex after a name and a length, each on a line of its own."""
    digits = b"".join(text[:MOST_TEXT_BYTES].split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
