"""Image files by their structure alone: their format and size, and the file without metadata.

Nothing is decoded, so that the cost is small however large the decoded image would be. Metadata is
dropped unread, but for the orientation: it must not be passed on, nor decide whether the image is
accepted, as malformed or very large colour profiles and comments would in decoders.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files import jpeg, png, webp
from stepserve.domain.image_files.orientation import FIRST_SIDEWAYS
from stepserve.domain.image_files.parts import Found, MalformedFileError

FORMATS = ("PNG", "JPEG", "WEBP")

_READERS = (
    (png.SIGNATURE, png.read),
    (jpeg.SIGNATURE, jpeg.read),
    (webp.SIGNATURE, webp.read),
)


@dataclass(frozen=True)
class ImageFile:
    """A file that holds pixels and how to turn them upright, and no other metadata.

    `width` and `height` are those of the upright image.
    """

    content: bytes
    width: int
    height: int


def read_image_file(file: bytes, field: str) -> ImageFile:
    """Return what the structure of a file says. Its content decides its format, and nothing else.

    Only decoding shows whether the pixels themselves can be read.

    Raises:
        InvalidRequestError: names `field`; it is no PNG, JPEG or WEBP file, or one cut short.
    """
    try:
        found = _read(file)
    except MalformedFileError as error:
        raise unreadable(field, file) from error
    width, height = found.width, found.height
    if found.orientation >= FIRST_SIDEWAYS:
        width, height = height, width
    return ImageFile(found.content, width, height)


def unreadable(field: str, file: bytes) -> InvalidRequestError:
    """What to raise for a file whose pixels cannot be read."""
    known = ", ".join(FORMATS)
    message = f"{field} of {len(file)} bytes cannot be read as an image (known: {known})"
    return InvalidRequestError(message, field)


def _read(file: bytes) -> Found:
    for signature, read in _READERS:
        if file.startswith(signature):
            return read(file)
    raise MalformedFileError("it is none of the known formats")
