"""Bodies that clients compress: which codings are taken, and how far one may unfold."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers

from stepserve.api.errors import MalformedBodyError, UnsupportedCodingError
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import BodyTooLargeError

SAME_AS = {"x-gzip": "gzip"}
NOTHING_TO_DO = ("", "identity", "chunked")

MAX_RATIO = 100
"""How many times longer a body may become. Images and base64 become hardly longer."""

FREE_BYTES = 65_536
"""Up to which the ratio does not matter."""

GZIP_BITS = 16 + zlib.MAX_WBITS
ZLIB_BITS = zlib.MAX_WBITS
RAW_BITS = -zlib.MAX_WBITS
ZLIB_METHOD = 8
"""The low half of the first byte where deflate comes with a zlib header, as it should."""


class Inflater:
    """A compressed body, which never becomes longer than `limit_bytes`."""

    def __init__(self, coding: str, limit_bytes: int) -> None:
        self._coding = coding
        self._limit_bytes = limit_bytes
        self._received_bytes = 0
        self._made_bytes = 0
        self._stream: zlib._Decompress | None = None

    def feed(self, data: bytes) -> bytes:
        """What the next part unfolds to.

        Raises:
            BodyTooLargeError: the body becomes too long, or too many times longer.
            MalformedBodyError: it is not compressed as it says.
        """
        if not data:
            return b""
        self._received_bytes += len(data)
        stream = self._stream = self._stream or self._open(data)
        try:
            made = stream.decompress(data, self._most_bytes() - self._made_bytes + 1)
        except zlib.error as error:
            raise MalformedBodyError(f"the body is no {self._coding}: {error}") from error
        self._made_bytes += len(made)
        self._check_length(len(made))
        if stream.unused_data:
            raise MalformedBodyError(f"more follows the end of the body's {self._coding}")
        return made

    def check_end(self) -> None:
        """Return if the body is whole.

        Raises:
            MalformedBodyError: it is not.
        """
        if self._stream is not None and not self._stream.eof:
            raise MalformedBodyError(f"the body's {self._coding} ends too early")

    def _open(self, data: bytes) -> zlib._Decompress:
        if self._coding == "gzip":
            return zlib.decompressobj(GZIP_BITS)
        return zlib.decompressobj(ZLIB_BITS if data[0] & 0xF == ZLIB_METHOD else RAW_BITS)

    def _most_bytes(self) -> int:
        by_ratio = max(FREE_BYTES, MAX_RATIO * self._received_bytes)
        return min(self._limit_bytes, by_ratio)

    def _check_length(self, made_bytes: int) -> None:
        if self._made_bytes > self._limit_bytes:
            raise BodyTooLargeError(
                f"the body decompresses to {self._limit_bytes} bytes or more, which is the limit"
            )
        if self._made_bytes > self._most_bytes():
            raise BodyTooLargeError(
                f"the body decompresses to over {MAX_RATIO} times its length, which is the limit"
            )


def inflater_of(headers: Headers, limit_bytes: int) -> Inflater | None:
    """What reads a body with these headers; None where it is not compressed.

    Raises:
        UnsupportedCodingError: it is compressed in a way, or in several, that nobody reads here.
    """
    said = [*headers.getlist("content-encoding"), *headers.getlist("transfer-encoding")]
    codings = [coding.strip().lower() for value in said for coding in value.split(",")]
    wanted = [SAME_AS.get(c, c) for c in codings if c not in NOTHING_TO_DO]
    if not wanted:
        return None
    if len(wanted) > 1 or wanted[0] not in UnsupportedCodingError.codings:
        known = " or ".join(UnsupportedCodingError.codings)
        raise UnsupportedCodingError(
            f"Content-Encoding must be {known} or none, got {shown(', '.join(wanted))}"
        )
    return Inflater(wanted[0], limit_bytes)
