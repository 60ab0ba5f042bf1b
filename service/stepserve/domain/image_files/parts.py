"""What the readers of image files share."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from stepserve.domain.image_files.orientation import UPRIGHT

MOST_PARTS = 20_000
"""Chunks or segments of one file: encoders write a few thousand at most."""


class MalformedFileError(ValueError):
    """The file does not follow its format."""


@dataclass(frozen=True)
class Found:
    """What the structure of a file says, and the file without metadata.

    `width` and `height` are those of the stored rows, before they are turned by `orientation`.
    """

    width: int
    height: int
    content: bytes
    orientation: int = UPRIGHT


def check(is_fine: bool, otherwise: str) -> None:
    """Raise MalformedFileError with the message `otherwise`, unless it is fine."""
    if not is_fine:
        raise MalformedFileError(otherwise)


class Reader:
    """A file, read from front to back.

    Raises:
        MalformedFileError: by every method, where the file ends too early or has too many parts.
    """

    def __init__(self, file: bytes, position: int) -> None:
        self.file = file
        self.position = position
        self._parts = 0

    @property
    def left_bytes(self) -> int:
        """Bytes that were not read yet."""
        return len(self.file) - self.position

    def begin_part(self) -> None:
        """Count a part, so that a file of very many empty ones is refused."""
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise MalformedFileError(f"it has more than {MOST_PARTS} parts")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left_bytes:
            raise MalformedFileError("it is cut short")
        self.position += count
        return self.file[self.position - count : self.position]

    def number(self, form: str) -> int:
        """The next whole number, of a format that `struct` knows."""
        number: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return number
