"""ASGI middleware that times every HTTP exchange, tells of it once it is over, and traces it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepserve.api.exchange_context import (
    UNMATCHED,
    Exchange,
    ExchangeListener,
    exchange_context_of,
)
from stepserve.api.http.middleware import UPLOADS
from stepserve.api.request_id import request_id_of
from stepserve.telemetry.tracing import TRACEPARENT, HttpSpan, HttpTraces, TraceContext, trace_id_in

CLIENT_LEFT = 499
TIMING_HEADER = "Server-Timing"
# Requests to these may be refused before the router has seen them.
_KNOWN = frozenset(UPLOADS)
# Folders of files, which are no routes.
_MOUNTS = ("/playground", "/docs/assets")


@dataclass(frozen=True)
class Observation:
    """Who hears of HTTP exchanges, where `/metrics` comes from, and what begins spans.

    None shows no metrics, and traces nothing.
    """

    listeners: tuple[ExchangeListener, ...] = ()
    read_metrics: Callable[[], Awaitable[str]] | None = None
    traces: HttpTraces | None = None


class ObservationMiddleware:
    """Tells listeners of each exchange. They must return at once, and not raise.

    Clients are told in `Server-Timing` how long a response took up to its first byte, where a route
    tells nothing more exact.
    """

    def __init__(self, app: ASGIApp, *, observation: Observation) -> None:
        self._app = app
        self._listeners = observation.listeners
        self._traces = observation.traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, to the last byte of its response."""
        started_s, status = time.perf_counter(), CLIENT_LEFT
        span = self._begin_span(scope)

        async def noticed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                total_ms = (time.perf_counter() - started_s) * 1000
                headers.setdefault(TIMING_HEADER, f"total;dur={total_ms:.1f}")
                if span is not None:
                    headers[TRACEPARENT] = span.traceparent
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except asyncio.CancelledError:
            exchange_context_of(scope).error_code = "request_cancelled"
            raise
        finally:
            trace_id = trace_id_in(Headers(scope=scope)) if span is None else span.trace_id
            exchange = _exchange(scope, status, trace_id, time.perf_counter() - started_s)
            if span is not None:
                _end_span(span, exchange)
            for listener in self._listeners:
                listener(exchange)

    def _begin_span(self, scope: Scope) -> HttpSpan | None:
        if self._traces is None or not _is_traced(scope["path"]):
            return None
        span = self._traces.begin(dict(Headers(scope=scope)), scope["method"])
        scope["state"]["trace_context"] = span.carrier
        return span


def trace_context_of(scope: Scope) -> TraceContext:
    """What whoever works for this exchange must be told of its trace; nothing without one."""
    context: TraceContext = scope["state"].get("trace_context", ())
    return context


def _is_traced(path: str) -> bool:
    """Whether it is a call of the API, and none that an open page makes again and again."""
    return path.startswith("/v1/") and not path.endswith("/batch")


def _end_span(span: HttpSpan, exchange: Exchange) -> None:
    attributes = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "stepserve.request_id": exchange.request_id,
        "stepserve.model": exchange.notes.model,
        "stepserve.caller": exchange.caller,
        "stepserve.outcome": exchange.outcome,
    }
    span.end(f"{exchange.method} {exchange.route}", exchange.status, attributes)


def _exchange(scope: Scope, status: int, trace_id: str, duration_s: float) -> Exchange:
    caller = scope["state"].get("caller")
    return Exchange(
        request_id=request_id_of(scope),
        trace_id=trace_id,
        method=scope["method"],
        route=_route(scope),
        status=status,
        duration_s=duration_s,
        caller="" if caller is None else caller.name,
        notes=exchange_context_of(scope),
    )


def _route(scope: Scope) -> str:
    """The template of the route, so that paths that anybody may think up add no series."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return template
    path: str = scope["path"]
    mounts = (mount for mount in _MOUNTS if path.startswith(f"{mount}/"))
    return path if path in _KNOWN else next(mounts, UNMATCHED)
