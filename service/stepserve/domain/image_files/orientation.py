"""How an image is to be turned before it is looked at, from the metadata of its file.

Cameras store the sensor's rows and say in EXIF, or in XMP, how they held it: 1 is upright, and from
5 on width and height change places. Malformed metadata has no orientation, and never raises.
"""

from __future__ import annotations

import re
import struct

UPRIGHT = 1
FIRST_SIDEWAYS = 5
ORIENTATIONS = range(1, 9)

EXIF_MARK = b"Exif\0\0"
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
_TAG = 0x0112
_ENTRY_BYTES = 12
_FORMATS = {1: "B", 3: "H", 4: "I"}
"""Of the types that whole numbers have in EXIF."""

_XMP_TAG = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation_in_exif(exif: bytes) -> int | None:
    """Return the orientation that EXIF has, or None if it has none."""
    try:
        return _find(exif.removeprefix(EXIF_MARK))
    except struct.error:
        return None


def orientation_in_xmp(xmp: bytes) -> int | None:
    """Return the orientation that XMP has, or None if it has none."""
    found = _XMP_TAG.search(xmp)
    return int(found[1]) if found else None


def exif_with(orientation: int) -> bytes:
    """Return EXIF with an orientation and nothing else."""
    entry = struct.pack("<HHIHH", _TAG, 3, 1, orientation, 0)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)


def _find(tiff: bytes) -> int | None:
    order = _BYTE_ORDERS.get(tiff[:2])
    if order is None:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for index in range(count):
        position = start + 2 + _ENTRY_BYTES * index
        tag, kind, _ = struct.unpack_from(f"{order}HHI", tiff, position)
        if tag == _TAG and kind in _FORMATS:
            (value,) = struct.unpack_from(order + _FORMATS[kind], tiff, position + 8)
            return value if value in ORIENTATIONS else None
    return None
