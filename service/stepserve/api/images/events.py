"""Server-sent events: what streams of images and of progress are made of."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

T = TypeVar("T")

KEEP_ALIVE_S = 10.0
"""After so long without an event a comment is sent: proxies end connections that are silent."""

KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Nothing between server and client may hold events back."""


class EventStreamResponse(StreamingResponse, Generic[T]):
    """A stream of server-sent events.

    Args:
        items: what they are made of; None makes a comment that keeps the connection. They are
            closed at the end.
        write: the events of an item.
        fail: the event for an error in `items` or `write`, or None where nobody must hear of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        items: AsyncGenerator[T | None, None],
        write: Callable[[T], Awaitable[Sequence[bytes]]],
        fail: Callable[[Exception], bytes | None],
    ) -> None:
        super().__init__(_events(items, write, fail), headers=HEADERS)


async def _events(
    items: AsyncGenerator[T | None, None],
    write: Callable[[T], Awaitable[Sequence[bytes]]],
    fail: Callable[[Exception], bytes | None],
) -> AsyncIterator[bytes]:
    try:
        async with aclosing(items):
            async for item in items:
                for event in [KEEP_ALIVE] if item is None else await write(item):
                    yield event
    except Exception as error:
        # The response has begun, so its status is sent already.
        if (failure := fail(error)) is not None:
            yield failure


def sse(event: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One event; `number` lets a client that reconnects say what it has seen."""
    text = json.dumps(data, separators=(",", ":"))
    return format_sse_event(data_str=text, event=event, id=None if number is None else str(number))
