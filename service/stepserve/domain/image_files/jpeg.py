"""The structure of JPEG files: segments with a marker and a length, then compressed scans."""

from __future__ import annotations

import struct

from stepserve.domain.image_files.orientation import (
    EXIF_MARK,
    UPRIGHT,
    exif_with,
    orientation_in_exif,
    orientation_in_xmp,
)
from stepserve.domain.image_files.parts import Found, MalformedFileError, Reader, check

SIGNATURE = b"\xff\xd8"

SCAN, END = 0xDA, 0xD9
BARE_MARKERS = (0x01, *range(0xD0, 0xD8))
"""They have no length and no content."""

FRAMES = tuple(set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC})
COMMENT, APPLICATIONS = 0xFE, range(0xE0, 0xF0)
COLOURS = ((0xE0, b"JFIF\0"), (0xEE, b"Adobe"))
"""Of what applications say, decoders need this to know which colours the numbers are."""

EXIF_MARKER = 0xE1
XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"

MOST_SCANS = 100
"""Each is a pass over all pixels: a small file with very many would take minutes to decode."""


def read(file: bytes) -> Found:
    """Return what the segments of a JPEG file say.

    Raises:
        MalformedFileError: it ends before its pixels, says no size, or has very many scans.
    """
    reader = Reader(file, len(SIGNATURE))
    kept = [SIGNATURE]
    exif: list[int | None] = []
    xmp: list[int | None] = []
    size: tuple[int, int] | None = None
    while (marker := _next_marker(reader)) != SCAN:
        content = reader.take(_length(reader))
        if marker in FRAMES:
            size = _size(content)
        if _is_needed(marker, content):
            kept.append(_segment(marker, content))
        elif marker == EXIF_MARKER and content.startswith(EXIF_MARK):
            exif.append(orientation_in_exif(content))
        elif marker == EXIF_MARKER and content.startswith(XMP_MARK):
            xmp.append(orientation_in_xmp(content))
    if size is None or 0 in size:
        raise MalformedFileError("it says no size")
    orientation = next(filter(None, exif + xmp), UPRIGHT)
    if orientation != UPRIGHT:
        kept.append(_segment(EXIF_MARKER, EXIF_MARK + exif_with(orientation)))
    return Found(*size, b"".join([*kept, _scans(reader)]), orientation)


def _next_marker(reader: Reader) -> int:
    """The next marker that begins a segment; bytes of 0xFF before it are of no meaning."""
    marker = 0xFF
    while marker in (0xFF, *BARE_MARKERS):
        reader.begin_part()
        if marker != 0xFF or reader.file[reader.position - 1] != 0xFF:
            check(reader.number(">B") == 0xFF, "a marker is missing")
        marker = reader.number(">B")
    check(marker not in (0x00, END), "it ends before its pixels")
    return marker


def _length(reader: Reader) -> int:
    length = reader.number(">H")
    check(length >= 2, "a segment has no length")
    return length - 2


def _size(frame: bytes) -> tuple[int, int]:
    check(len(frame) >= 5, "a frame is cut short")
    height, width = struct.unpack(">HH", frame[1:5])
    return width, height


def _is_needed(marker: int, content: bytes) -> bool:
    if marker not in APPLICATIONS:
        return marker != COMMENT
    return any(marker == known and content.startswith(mark) for known, mark in COLOURS)


def _scans(reader: Reader) -> bytes:
    """The rest of the file, from the marker of the first scan on."""
    scans = reader.file[reader.position - 2 :]
    # In compressed data 0xFF is followed by 0 or by one of the bare markers.
    check(scans.count(bytes((0xFF, SCAN))) <= MOST_SCANS, f"it has more than {MOST_SCANS} scans")
    return scans


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
