"""Server-sent events: what streams of images and of progress are made of."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

KEEP_ALIVE_S = 10.0
"""After so long without an event a comment is sent: proxies end connections that are silent."""

KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Nothing between server and client may hold events back."""


class EventStreamResponse(StreamingResponse):
    """A stream of server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, headers=HEADERS)


def sse(event: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One event; `number` lets a client that reconnects say what it has seen."""
    text = json.dumps(data, separators=(",", ":"))
    return format_sse_event(data_str=text, event=event, id=None if number is None else str(number))
