"""Which exchanges are in flight, so that a server that stops can let each hear how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

RESPONSE_S = 4.0
"""How long an exchange that is told of the stop may take to say so."""


class InFlight:
    """The exchanges whose last byte was not yet written.

    `stopped` is set once those that are still in flight are to end with `StoppedError`.
    """

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self._exchanges: set[asyncio.Future[None]] = set()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """An exchange is in flight until the block is left."""
        over = asyncio.get_running_loop().create_future()
        self._exchanges.add(over)
        try:
            yield
        finally:
            self._exchanges.discard(over)
            over.set_result(None)

    async def settle(self, within_s: float) -> int:
        """Wait for every exchange that is in flight now, and end those that take longer.

        Returns how many had to be told that the server stops.
        """
        if not self._exchanges:
            return 0
        _, late = await asyncio.wait(self._exchanges, timeout=within_s)
        if late:
            self.stopped.set()
            await asyncio.wait(late, timeout=RESPONSE_S)
        return len(late)


class InFlightMiddleware:
    """Keeps count of exchanges, from the first byte of a request to the last of its response."""

    def __init__(self, app: ASGIApp, *, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            # The start and the end of the app are the router's: what comes after sees HTTP only.
            await scope["app"].router(scope, receive, send)
            return
        with self._in_flight.exchange():
            await self._app(scope, receive, send)
