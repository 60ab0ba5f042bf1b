"""How long a URL may be, and how much may be in the headers of a request."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from stepserve.api.errors import HeadersTooLargeError, UrlTooLongError, error_response
from stepserve.api.request_id import request_id_of
from stepserve.config import HttpSettings
from stepserve.domain.errors import InvalidRequestError

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


class HeadLimitMiddleware:
    """Refuses requests whose URL or headers are over the limits, whatever server took them."""

    def __init__(self, app: ASGIApp, *, limits: HttpSettings) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or answer 414 or 431."""
        try:
            self._check(scope)
        except InvalidRequestError as error:
            return await error_response(error, request_id_of(scope))(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        check_url(len(path) + len(scope.get("query_string", b"")), self._limits)
        headers = scope["headers"]
        size_bytes = sum(header_bytes(name, value) for name, value in headers)
        check_headers(len(headers), size_bytes, self._limits)


def header_bytes(name: bytes, value: bytes) -> int:
    """How long a header is, as it is sent."""
    return len(name) + len(value) + FIELD_OVERHEAD_BYTES
