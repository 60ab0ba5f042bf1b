"""Images from outside: what their files say, and whether that is within the limits.

Nothing is decoded here, on the event loop that answers everybody: that comes where the work is
admitted, and so does what is wrong with the pixels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile, read_image_file


@dataclass(frozen=True)
class UploadLimits:
    """What is taken from outside.

    Args:
        max_bytes: of one image file.
        max_pixels: of one image; known before it is decoded.
        urls: whether images may be fetched from `http` and `https` addresses.
        fetch_timeout_s: how long fetching those of one request may take.
        max_pending_bytes: of all requests of one process that are not answered yet.
    """

    max_bytes: int = 10 * 2**20
    max_pixels: int = 4096 * 4096
    urls: bool = False
    fetch_timeout_s: float = 10.0
    max_pending_bytes: int = 96 * 2**20


def read_upload(file: bytes, field: str, limits: UploadLimits) -> ImageFile:
    """Return an image without metadata, and its size.

    Raises:
        InvalidRequestError: names `field`, what is wrong with the file, and the limit.
    """
    if len(file) > limits.max_bytes:
        raise InvalidRequestError(
            f"{field} is {len(file)} bytes long; the limit is {limits.max_bytes} bytes", field
        )
    image = read_image_file(file, field)
    if image.width * image.height > limits.max_pixels:
        raise InvalidRequestError(
            f"{field} is {image.width}x{image.height} pixels; "
            f"the limit is {limits.max_pixels} pixels",
            field,
        )
    return image
