"""Timers by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timers:
    """Of one connection, say: one of each name runs at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[str, asyncio.TimerHandle] = {}

    def start(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Call `call` in so many seconds; another timer of that name is stopped."""
        self.stop(name)
        self._running[name] = self._loop.call_later(seconds, self._end, name, call)

    def start_once(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Start one unless one of that name runs."""
        if name not in self._running:
            self.start(name, seconds, call)

    def stop(self, name: str) -> None:
        """Stop it, if it runs."""
        if name in self._running:
            self._running.pop(name).cancel()

    def stop_all(self) -> None:
        """Stop all that run."""
        for name in list(self._running):
            self.stop(name)

    def _end(self, name: str, call: Callable[[], None]) -> None:
        del self._running[name]
        call()
