"""Answers to what never became a request: too long, too slow, no HTTP, or one too many."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from stepserve.api.errors import error_response, kind_of
from stepserve.api.exchange_context import UNMATCHED, Exchange, ExchangeContext, ExchangeListener
from stepserve.api.request_id import REQUEST_ID_HEADER
from stepserve.domain.errors import RefusedError, StepserveError

NO_METHOD = "-"

RawHeader = tuple[bytes, bytes]


@dataclass(frozen=True)
class Refusals:
    """Makes them, and lets `listeners` know, as they know of all other answers."""

    listeners: tuple[ExchangeListener, ...] = ()

    def answer(self, error: StepserveError, headers: Iterable[RawHeader]) -> bytes:
        """Return the response as it is sent, with `headers` and all that errors have."""
        request_id = uuid.uuid4().hex
        exchange = _exchange(error, request_id)
        for listener in self.listeners:
            listener(exchange)
        response = error_response(error, request_id)
        ours = [(REQUEST_ID_HEADER.encode(), request_id.encode()), (b"connection", b"close")]
        told = [*headers, *response.raw_headers, *ours]
        lines = [name + b": " + value + b"\r\n" for name, value in told]
        return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", response.body])


def _exchange(error: StepserveError, request_id: str) -> Exchange:
    kind = kind_of(error)
    return Exchange(
        request_id=request_id,
        trace_id="",
        method=NO_METHOD,
        route=UNMATCHED,
        status=kind.status,
        duration_s=0.0,
        caller="",
        notes=ExchangeContext(error_code=kind.code, is_refusal=isinstance(error, RefusedError)),
    )
