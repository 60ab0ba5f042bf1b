"""Bytes of bodies whose requests are not answered yet: counted, and bounded.

A request with images keeps them until its response, as another replica may have to take it over.
How many images may wait is limited elsewhere; how long their files are is not known there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepserve.api.bodies.reading import SMALL_BYTES, declared_bytes
from stepserve.domain.errors import ServerFullError

RETRY_S = 2.0

QUIET_S = 10.0
"""How long a long body waits unread for others while none of them ends; what is too much
afterwards is refused."""

MOST_WAIT_S = 60.0
"""And however many end."""


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
                f"the server is full: requests in flight hold {self.held_bytes} bytes of images, "
                f"the limit is {self._most_bytes}, and this one has {size_bytes} more",
                RETRY_S,
            )


class BodyTurns:
    """Lets long bodies be sent while all together are at most `most_bytes`, by what they declare.

    So many of them that come at once are read one after another, rather than refused. Who has
    waited for long goes ahead: those before may be slow, and they are what gives way then.

    Args:
        quiet_s: how long one waits while none ends.
    """

    def __init__(self, most_bytes: int, quiet_s: float = QUIET_S) -> None:
        self._most_bytes = most_bytes
        self._quiet_s = quiet_s
        self._taken_bytes = 0
        # Replaced whenever there is more room: whoever waits for it waits for the one there is now.
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def turn(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for a turn, and keep it until the block is left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(MOST_WAIT_S):
                while self._taken_bytes and self._taken_bytes + size_bytes > self._most_bytes:
                    await asyncio.wait_for(self._freed.wait(), self._quiet_s)
        self._taken_bytes += size_bytes
        try:
            yield
        finally:
            self._taken_bytes -= size_bytes
            self._freed.set()
            self._freed = asyncio.Event()


class BodyTurnsMiddleware:
    """Lets long bodies wait for their turn. Comes before what reads them."""

    def __init__(self, app: ASGIApp, *, turns: BodyTurns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection when it is its turn."""
        size_bytes = declared_bytes(Headers(scope=scope))
        if size_bytes <= SMALL_BYTES:
            return await self._app(scope, receive, send)
        async with self._turns.turn(size_bytes):
            return await self._app(scope, receive, send)


class PendingBytesMiddleware:
    """Refuses bodies for which there is no room. Comes after what reads them."""

    def __init__(self, app: ASGIApp, *, pending: PendingBytes) -> None:
        self._app = app
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection.

        Raises:
            ServerFullError: there is no room for its body.
        """
        size_bytes = scope["state"].get("body_bytes", 0)
        with self._pending.hold() as hold:
            hold.grow(size_bytes if size_bytes > SMALL_BYTES else 0)
            scope["state"]["hold"] = hold
            await self._app(scope, receive, send)
