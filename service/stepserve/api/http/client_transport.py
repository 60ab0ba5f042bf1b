"""What an HTTP connection writes to: closing loses no response; a client that left is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_S = 5.0
"""How long the rest of a request is read and dropped after its response.

Closed at once, the kernel would tell the client that the connection is broken, and most clients
would drop the response that is on its way."""

DROP_S = 0.5

STATUS_LINE_BEGIN = b"HTTP/1.1 "
"""How every response begins."""

MAX_ZEROS = 8
"""Before the size of a chunk: zeros in front change no number."""


class ClientTransport:
    """A transport of asyncio's for one HTTP connection; what is not said here is as it was.

    Args:
        transport: the connection itself.
        send_timeout_s: how long a closed connection waits for its client to take the rest.
        has_unread: whether the client may still be sending a request, which nobody will read.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        send_timeout_s: float,
        has_unread: Callable[[], bool],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._send_timeout_s = send_timeout_s
        self._has_unread = has_unread
        self._closing = False
        self._end: asyncio.TimerHandle | None = None
        self._begun = b""
        self._zeros = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data`, without what `probe` has already sent of it."""
        if not data:
            return
        begun, self._begun, self._zeros = self._begun, b"", 0
        self._transport.write(data.removeprefix(begun))

    def probe(self, in_chunks: bool) -> None:
        """Send a byte that the client will get anyway: the kernel of one that is gone refuses it.

        The first refusal is heard of at the next write, so it takes two.

        Args:
            in_chunks: the response has begun, and goes on with a chunk.
        """
        if in_chunks and self._zeros < MAX_ZEROS:
            self._zeros += 1
            self._transport.write(b"0")
        elif not in_chunks and len(self._begun) < len(STATUS_LINE_BEGIN):
            sent = len(self._begun)
            self._begun = STATUS_LINE_BEGIN[: sent + 1]
            self._transport.write(STATUS_LINE_BEGIN[sent : sent + 1])

    def is_closing(self) -> bool:
        """Whether it is closed, or reads only to drop what it gets."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send what was written, and close; a client that takes it too slowly is cut off."""
        if self.is_closing():
            return
        self._closing = True
        if self._has_unread():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._end = self._loop.call_later(LINGER_S, self._transport.abort)
        else:
            self._transport.close()
            self._end = self._loop.call_later(self._send_timeout_s, self._transport.abort)

    def drop(self) -> None:
        """Close, with no more patience than a short answer needs."""
        if self._closing:
            self._transport.abort()
            return
        self._closing = True
        self._transport.close()
        self._end = self._loop.call_later(DROP_S, self._transport.abort)

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._transport.abort()

    def lost(self) -> None:
        """Called once the connection is gone."""
        self._closing = True
        if self._end is not None:
            self._end.cancel()
