"""Bytes of bodies whose requests are not answered yet: counted, and bounded.

A request with images keeps them until its answer, as another replica may have to take it over. How
many pictures may wait is limited elsewhere; how long their files are is not known there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.api.middleware import request_id_of
from service.domain.errors import ServerFullError

SMALL_BYTES = 65_536
"""Bodies up to this length are not counted, so that requests without images always get in."""

RETRY_S = 2.0


class Hold:
    """What one request holds."""

    def __init__(self, pending: PendingBytes) -> None:
        self._pending = pending
        self.size_bytes = 0

    def grow(self, size_bytes: int) -> None:
        """Hold so many bytes more.

        Raises:
            ServerFullError: there is no room for them; what was held before still is.
        """
        self._pending.check_room(size_bytes)
        self.change(size_bytes)

    def change(self, size_bytes: int) -> None:
        """Hold so many bytes more, or less where it is negative, whether there is room or not."""
        self.size_bytes += size_bytes
        self._pending.held_bytes += size_bytes


class PendingBytes:
    """At most `most_bytes` of all requests of one process. Not thread-safe: for one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.held_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Hold what the block says, until it is left."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            hold.change(-hold.size_bytes)

    def check_room(self, size_bytes: int) -> None:
        """Return if so many bytes more may be held. An empty server takes any request.

        Raises:
            ServerFullError: they may not.
        """
        if self.held_bytes and self.held_bytes + size_bytes > self._most_bytes:
            raise ServerFullError(
                f"the server is full: requests in hand hold {self.held_bytes} bytes of images and "
                f"the limit is {self._most_bytes}; this one has {size_bytes} more",
                RETRY_S,
            )


class PendingBytesMiddleware:
    """Refuses bodies for which there is no room. Comes after what reads them."""

    def __init__(self, app: ASGIApp, *, pending: PendingBytes) -> None:
        self._app = app
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or answer 429."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        size_bytes = scope["state"].get("body_bytes", 0)
        with self._pending.hold() as hold:
            try:
                hold.grow(size_bytes if size_bytes > SMALL_BYTES else 0)
            except ServerFullError as error:
                return await error_response(error, request_id_of(scope))(scope, receive, send)
            scope["state"]["hold"] = hold
            return await self._app(scope, receive, send)


def hold_of(scope: Scope) -> Hold:
    """What the request of a connection holds."""
    hold: Hold = scope["state"]["hold"]
    return hold
