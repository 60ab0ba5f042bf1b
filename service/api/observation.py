"""ASGI middleware that tells of every HTTP exchange once it is over."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.middleware import UPLOADS, request_id_of
from service.api.notes import Exchange, ExchangeListener, notes_of

CLIENT_LEFT = 499
UNMATCHED = "unmatched"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_NO_TRACE = "0" * 32
# Requests to these may be refused before the router has seen them.
_KNOWN = frozenset({"/v1/images/generations", *UPLOADS})
# Folders of files, which are no routes.
_MOUNTS = ("/playground", "/docs/assets")


class ObservationMiddleware:
    """Tells listeners of each exchange. They must return at once, and not raise."""

    def __init__(self, app: ASGIApp, *, listeners: Sequence[ExchangeListener]) -> None:
        self._app = app
        self._listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, to the last byte of its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started_s, status = time.perf_counter(), CLIENT_LEFT

        async def noticed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except asyncio.CancelledError:
            notes_of(scope).error_code = "request_cancelled"
            raise
        finally:
            self._tell(_exchange(scope, status, time.perf_counter() - started_s))

    def _tell(self, exchange: Exchange) -> None:
        for listener in self._listeners:
            listener(exchange)


def trace_id_of(scope: Scope) -> str:
    """The trace that a request belongs to, by its W3C `traceparent`; empty if there is none."""
    found = _TRACEPARENT.fullmatch(Headers(scope=scope).get("traceparent", ""))
    return found[1] if found and found[1] != _NO_TRACE else ""


def _exchange(scope: Scope, status: int, duration_s: float) -> Exchange:
    caller = scope["state"].get("caller")
    return Exchange(
        request_id=request_id_of(scope),
        trace_id=trace_id_of(scope),
        method=scope["method"],
        route=_route(scope),
        status=status,
        duration_s=duration_s,
        caller="" if caller is None else caller.name,
        notes=notes_of(scope),
    )


def _route(scope: Scope) -> str:
    """The template of the route, so that paths that anybody may think up add no series."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return template
    path: str = scope["path"]
    mounts = (mount for mount in _MOUNTS if path.startswith(f"{mount}/"))
    return path if path in _KNOWN else next(mounts, UNMATCHED)
