"""An event loop on which nobody waits: while all its tasks sleep, its clock leaps to the next."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class LeapingSelector(selectors.DefaultSelector):
    """Polls, and adds the time that it would have waited to its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a limit there is nothing to leap to: somebody outside, such as a thread, will act.
        ready = super().select(timeout if timeout is None else 0)
        if timeout is not None and timeout > 0 and not ready:
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For tests marked `virtual_time`, which use no threads, and sockets to themselves at most."""

    def __init__(self) -> None:
        self._leaping = LeapingSelector()
        super().__init__(self._leaping)

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._leaping.now_s


def clock() -> float:
    """Virtual seconds, to hand to what is tested."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop), "this test is not marked virtual_time"
    return loop.time()


async def pass_time(seconds: float) -> None:
    """Let so many virtual seconds pass."""
    clock()
    await asyncio.sleep(seconds)


async def until(condition: Callable[[], Any], within_s: float = 60.0) -> None:
    """Let virtual time pass until something holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await pass_time(0.005)
