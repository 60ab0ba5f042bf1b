"""Which exchanges are in flight, so that a server that stops can let each hear how it ended."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

RESPONSE_S = 4.0
"""How long an exchange that is told of the stop may take to say so."""


class InFlight:
    """The exchanges whose last byte was not yet written.

    `stopped` is set once those that are still in flight are to end with `StoppedError`.
    """

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self._exchanges: set[asyncio.Event] = set()

    def begin(self) -> asyncio.Event:
        """An exchange begins."""
        over = asyncio.Event()
        self._exchanges.add(over)
        return over

    def end(self, over: asyncio.Event) -> None:
        """It is over."""
        over.set()
        self._exchanges.discard(over)

    async def settle(self, within_s: float) -> int:
        """Wait for every exchange that is in flight now, and end those that take longer.

        Returns how many had to be told that the server stops.
        """
        exchanges = [asyncio.create_task(over.wait()) for over in self._exchanges]
        if not exchanges:
            return 0
        _, late = await asyncio.wait(exchanges, timeout=within_s)
        if late:
            self.stopped.set()
            await asyncio.wait(late, timeout=RESPONSE_S)
        for task in exchanges:
            task.cancel()
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
            return await scope["app"].router(scope, receive, send)
        over = self._in_flight.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.end(over)
