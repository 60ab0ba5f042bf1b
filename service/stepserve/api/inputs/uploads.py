"""Images from outside: what their files say, and whether that is within the limits.

Nothing is decoded here, on the event loop that answers everybody: that comes where the work is
admitted, and so does what is wrong with the pixels themselves.
"""

from __future__ import annotations

from stepserve.config import UploadSettings
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile, read_image_file


def read_upload(file: bytes, field: str, limits: UploadSettings) -> ImageFile:
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
