"""Work that lives no longer than the client's connection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from stepserve.api.errors import RequestTimedOutError
from stepserve.domain.errors import CancelledError, StoppedError

T = TypeVar("T")

STOPPED = "the server stopped before the request was finished; send it again"

CANCEL_GRACE_S = 1.0
"""How long cancelled work may hold up the response while it cleans up."""


async def while_connected(
    receive: Receive,
    items: AsyncGenerator[T, None],
    timeout_s: float,
    stopped: asyncio.Event | None = None,
    quiet_s: float = math.inf,
) -> AsyncGenerator[T | None, None]:
    """Yield `items`, and None after every `quiet_s` seconds without one; then close them.

    They are closed as soon as nobody waits for them any more. Three signs tell that: this generator
    is closed, `receive` gives a disconnect (plain ASGI servers), or the calling task is itself
    cancelled (Ray Serve). The request body must have been read before.

    Raises:
        CancelledError: the client left, or the work on `items` was cancelled from elsewhere.
        StoppedError: `stopped` was set, as the server stops.
        RequestTimedOutError: `items` went on for more than `timeout_s` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    leaving = asyncio.create_task(_until_disconnect(receive))
    stopping = asyncio.create_task(_until_stopped(stopped))
    following = asyncio.create_task(_next(items))
    try:
        while True:
            wait_s = min(quiet_s, deadline_s - loop.time())
            waiting = {following, leaving, stopping}
            await asyncio.wait(waiting, timeout=wait_s, return_when="FIRST_COMPLETED")
            if following.done():
                if not (item := _result(following)):
                    return
                following = asyncio.create_task(_next(items))
                yield item[0]
            elif leaving.done():
                raise CancelledError("the client left before the request was finished")
            elif stopping.done():
                raise StoppedError(STOPPED)
            elif loop.time() >= deadline_s:
                raise RequestTimedOutError(f"the request was not finished within {timeout_s:g} s")
            else:
                yield None
    finally:
        await _stop(following, leaving, stopping)
        if following.done():
            await items.aclose()


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield what all `sources` yield, as it comes, each with the index of its source.

    All are closed once this is closed, or one of them raises, which this then does as well.
    """
    following = {asyncio.create_task(_next(source)): i for i, source in enumerate(sources)}
    try:
        while following:
            done, _ = await asyncio.wait(following, return_when="FIRST_COMPLETED")
            for task in sorted(done, key=following.__getitem__):
                index = following.pop(task)
                if item := _result(task):
                    following[asyncio.create_task(_next(sources[index]))] = index
                    yield index, item[0]
    finally:
        await _stop(*following)
        stuck = {i for task, i in following.items() if not task.done()}
        for source in (source for i, source in enumerate(sources) if i not in stuck):
            await source.aclose()


async def _next(items: AsyncGenerator[T, None]) -> tuple[T] | None:
    """The next item in a tuple, or None after the last: a task cannot raise StopAsyncIteration."""
    async for item in items:
        return (item,)
    return None


def _result(task: asyncio.Task[T]) -> T:
    if task.cancelled():
        # Passed on as it is, it would look like our own cancellation, without a response.
        raise CancelledError("the request was cancelled")
    return task.result()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_stopped(stopped: asyncio.Event | None) -> None:
    await (stopped or asyncio.Event()).wait()


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
        task.add_done_callback(_forget)
    # Not awaited without end: work that ignores its cancellation must not hold the response.
    if tasks:
        await asyncio.wait(tasks, timeout=CANCEL_GRACE_S)


def _forget(task: asyncio.Task[Any]) -> None:
    """Look at the exception, which asyncio would otherwise report as never retrieved."""
    if not task.cancelled():
        task.exception()
