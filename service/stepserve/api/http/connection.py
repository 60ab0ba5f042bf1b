"""Work that lives no longer than the client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
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
    work: Coroutine[Any, Any, T],
    timeout_s: float,
    stopped: asyncio.Event | None = None,
) -> T:
    """Return the result of `work`, which is cancelled as soon as nobody waits for it any more.

    Two signs tell that: `receive` gives a disconnect (plain ASGI servers), or the calling task
    is itself cancelled (Ray Serve). The request body must have been read before.

    Raises:
        CancelledError: the client left, or `work` was cancelled from elsewhere.
        StoppedError: `stopped` was set, as the server stops.
        RequestTimedOutError: `work` took more than `timeout_s` seconds.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_until_disconnect(receive))
    stopping = asyncio.create_task(_until_stopped(stopped))
    try:
        waiting = {working, leaving, stopping}
        await asyncio.wait(waiting, timeout=timeout_s, return_when="FIRST_COMPLETED")
        if working.cancelled():
            # Passed on as it is, it would look like our own cancellation and go unanswered.
            raise CancelledError("the request was cancelled")
        if working.done():
            return working.result()
        if leaving.done():
            raise CancelledError("the client left before the request was finished")
        if stopping.done():
            raise StoppedError(STOPPED)
        raise RequestTimedOutError(f"the request was not finished within {timeout_s:g} s")
    finally:
        await _stop(working, leaving, stopping)


async def stream_while_connected(
    receive: Receive,
    items: AsyncGenerator[T, None],
    quiet_s: float,
    timeout_s: float,
    stopped: asyncio.Event | None = None,
) -> AsyncGenerator[T | None, None]:
    """Yield `items`, and None after every `quiet_s` seconds without one; then close them.

    Closing this generator, the client leaving, and the calling task being cancelled close `items`.

    Raises:
        CancelledError: the client left.
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
                if not (item := following.result()):
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
        await items.aclose()


async def _next(items: AsyncGenerator[T, None]) -> tuple[T] | None:
    """The next item in a tuple, or None after the last: a task cannot raise StopAsyncIteration."""
    async for item in items:
        return (item,)
    return None


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
    await asyncio.wait(tasks, timeout=CANCEL_GRACE_S)


def _forget(task: asyncio.Task[Any]) -> None:
    """Look at the exception, which asyncio would otherwise report as never retrieved."""
    if not task.cancelled():
        task.exception()
