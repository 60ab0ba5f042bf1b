"""How long a URL may be, and how much may be in the headers of a request."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from stepserve.api.errors import HeadersTooLargeError, UrlTooLongError, error_response
from stepserve.api.request_id import request_id_of
from stepserve.config import HttpSettings
from stepserve.domain.errors import InvalidRequestError

FIELD_OVERHEAD_BYTES = len(": \r\n")


@dataclass(frozen=True)
class HeadLimits:
    """What is taken of a request before its body.

    Args:
        max_url_bytes: of path and query.
        max_header_bytes: of all headers together, with their names and line ends.
        max_headers: how many there may be.
    """

    max_url_bytes: int = 8192
    max_header_bytes: int = 32_768
    max_headers: int = 100

    def check_url(self, size_bytes: int) -> None:
        """Return if a URL may be that long.

        Raises:
            UrlTooLongError: it may not.
        """
        if size_bytes > self.max_url_bytes:
            raise UrlTooLongError(
                f"the URL is {size_bytes} bytes long or more; the limit is {self.max_url_bytes} "
                "bytes; put long values into the body"
            )

    def check_headers(self, count: int, size_bytes: int) -> None:
        """Return if there may be so many headers, of so many bytes together.

        Raises:
            HeadersTooLargeError: there may not.
        """
        if count > self.max_headers:
            raise HeadersTooLargeError(
                f"there are {count} headers or more; the limit is {self.max_headers}"
            )
        if size_bytes > self.max_header_bytes:
            raise HeadersTooLargeError(
                f"the headers are {size_bytes} bytes long or more; the limit is "
                f"{self.max_header_bytes} bytes"
            )


def head_limits(http: HttpSettings) -> HeadLimits:
    """What is taken of URLs and headers."""
    return HeadLimits(http.max_url_bytes, http.max_header_bytes, http.max_headers)


class HeadLimitMiddleware:
    """Refuses requests whose URL or headers are over the limits, whatever server took them."""

    def __init__(self, app: ASGIApp, *, limits: HeadLimits) -> None:
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
        self._limits.check_url(len(path) + len(scope.get("query_string", b"")))
        headers = scope["headers"]
        size_bytes = sum(header_bytes(name, value) for name, value in headers)
        self._limits.check_headers(len(headers), size_bytes)


def header_bytes(name: bytes, value: bytes) -> int:
    """How long a header is, as it is sent."""
    return len(name) + len(value) + FIELD_OVERHEAD_BYTES
