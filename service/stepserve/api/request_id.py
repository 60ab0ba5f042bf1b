"""The id that a caller knows an HTTP request by, and headers of the response such as it."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Scope, Send

REQUEST_ID_HEADER = "X-Request-ID"


def request_id_of(scope: Scope) -> str:
    """Return the id that the caller knows this request by."""
    request_id: str = scope["state"]["request_id"]
    return request_id


def with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """Return a `send` that puts `headers` into the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return send_with_headers
