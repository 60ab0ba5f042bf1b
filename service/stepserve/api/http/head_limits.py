"""How long a URL may be, and how much may be in the headers of a request."""

from __future__ import annotations

from starlette.types import Scope

from stepserve.api.errors import HeadersTooLargeError, UrlTooLongError
from stepserve.config import HttpSettings

FIELD_OVERHEAD_BYTES = len(": \r\n")


def check_url(size_bytes: int, limits: HttpSettings) -> None:
    """Return if a URL may be that long.

    Raises:
        UrlTooLongError: it may not.
    """
    if size_bytes > limits.max_url_bytes:
        raise UrlTooLongError(
            f"the URL is {size_bytes} bytes long or more; the limit is {limits.max_url_bytes} "
            "bytes; put long values into the body"
        )


def check_headers(count: int, size_bytes: int, limits: HttpSettings) -> None:
    """Return if there may be so many headers, of so many bytes together.

    Raises:
        HeadersTooLargeError: there may not.
    """
    if count > limits.max_headers:
        raise HeadersTooLargeError(
            f"there are {count} headers or more; the limit is {limits.max_headers}"
        )
    if size_bytes > limits.max_header_bytes:
        raise HeadersTooLargeError(
            f"the headers are {size_bytes} bytes long or more; the limit is "
            f"{limits.max_header_bytes} bytes"
        )


def check_head(scope: Scope, limits: HttpSettings) -> None:
    """Return if URL and headers of a request are within the limits, whatever server took it.

    Raises:
        UrlTooLongError: the URL is not.
        HeadersTooLargeError: the headers are not.
    """
    path = scope.get("raw_path") or scope["path"].encode()
    check_url(len(path) + len(scope.get("query_string", b"")), limits)
    headers = scope["headers"]
    size_bytes = sum(header_bytes(name, value) for name, value in headers)
    check_headers(len(headers), size_bytes, limits)


def header_bytes(name: bytes, value: bytes) -> int:
    """How long a header is, as it is sent."""
    return len(name) + len(value) + FIELD_OVERHEAD_BYTES
