"""The half of a connection that parses requests: what one may hold, and how its bytes are fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stepserve.api.errors import HeadersTooLargeError, MalformedHttpError, MethodNotAllowedError
from stepserve.api.http.head_limits import check_headers, check_url, header_bytes
from stepserve.config import HttpSettings
from stepserve.domain.errors import StepserveError

PIECE_BYTES = 4096
"""What is parsed at a time, but for bodies: then it is asked whether there may be more."""

VERSIONS = ("1.0", "1.1")
OF_AN_UPGRADE = (b"upgrade", b"http2-settings", b"connection")


class LimitedParsing(HttpToolsProtocol):
    """Parses requests, and calls `refuse` for one that is over the limits or none."""

    def __init__(self, limits: HttpSettings, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._limits = limits
        # Of the request that is being parsed. Before its first byte it is in its head, too.
        self.url = b""
        self.in_head = True
        self._is_upgrade = False
        self._head_bytes = self._header_count = self._body_left_bytes = 0
        # What came since the parser last got on: a header, or what is around parts of a body.
        self.loose_bytes = 0
        self._wrong: StepserveError | None = None

    def refuse(self, error: StepserveError) -> None:
        """Parse nothing more, and answer with `error`."""
        raise NotImplementedError

    def next_bytes(self) -> int:
        """How much may be parsed next: a body as a whole, as there is no end of a request in it."""
        return PIECE_BYTES if self.in_head else max(PIECE_BYTES, self._body_left_bytes)

    def parse(self, piece: memoryview) -> None:
        """Parse what came."""
        rest = self._feed(piece)
        if rest is not None:
            self._parse_without_upgrade(rest)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._is_upgrade = False
        self._head_bytes = self._header_count = self._body_left_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A part of its URL."""
        super().on_url(url)
        self._check(check_url, len(self.url), self._limits)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer, which counts but is dropped, as it comes after all checks."""
        self._header_count += 1
        self._head_bytes += header_bytes(name, value)
        self._check(check_headers, self._header_count, self._head_bytes, self._limits)
        if self.in_head:
            super().on_header(name, value)
            if name.lower() == b"content-length":
                self._body_left_bytes = int(value)

    def on_headers_complete(self) -> None:
        """Its body begins, if it has one."""
        self._check(_check_version, self.parser.get_http_version())
        self.loose_bytes = 0
        self._is_upgrade = self.parser.should_upgrade()
        if not self._is_upgrade:
            self.in_head = False
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self.loose_bytes = 0
        self._body_left_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It is whole."""
        if not self._is_upgrade:
            self.loose_bytes = 0
            self.in_head = True
            super().on_message_complete()

    def _feed(self, piece: memoryview) -> memoryview | None:
        """Parse; returns what follows a request that asks for another protocol."""
        self.loose_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
            # What may be of the URL, or of the request before, counts for neither.
            loose_bytes = self.loose_bytes - len(self.url) - PIECE_BYTES
            check_headers(self._header_count, loose_bytes, self._limits)
        except httptools.HttpParserUpgrade as upgrade:
            return piece[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            malformed = MalformedHttpError(f"this is not HTTP/1.1: {error}")
            self.refuse(self._wrong or malformed)
        except HeadersTooLargeError as error:
            self.refuse(error)
        return None

    def _parse_without_upgrade(self, rest: memoryview) -> None:
        """Parse again what asks for another protocol, as a request of this one.

        The parser takes all after the headers for the other protocol; but servers may ignore that
        they are asked, and some clients ask with every request that has a body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.refuse(
                MethodNotAllowedError("CONNECT is not supported: this server is not a proxy")
            )
            return
        head = [method + b" " + self.url + b" HTTP/1.1"]
        head += [n + b": " + v for n, v in self.headers if n not in OF_AN_UPGRADE]
        self.parser = httptools.HttpRequestParser(self)
        self.parse(memoryview(b"\r\n".join([*head, b"", b""])))
        self.parse(rest)

    def _check(self, check: Callable[..., None], *args: Any) -> None:
        """The parser stops at any error, and does not tell which one it was."""
        try:
            check(*args)
        except StepserveError as error:
            self._wrong = error
            raise


def _check_version(version: str) -> None:
    """The parser takes others as well, and reads them as if they were these."""
    if version not in VERSIONS:
        raise MalformedHttpError(f"HTTP/1.1 is required, got HTTP/{version}")
