"""HTTP/1.1 on one connection, as uvicorn speaks it, with limits for whoever is on its other side.

uvicorn's parser takes URLs and headers of any length and has no time limit before the first byte of
a response; one client could so hold up all others, which share an event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from stepserve.api.errors import SlowRequestError, TooManyConnectionsError
from stepserve.api.http.client_transport import ClientTransport
from stepserve.api.http.open_connections import OpenConnections
from stepserve.api.http.parsing import LimitedParsing
from stepserve.api.http.refusals import Refusals
from stepserve.api.http.timers import Timers
from stepserve.config import HttpSettings
from stepserve.domain.errors import StepserveError

FIRST_PROBE_S = 0.2
PROBE_FACTOR = 4
RETRY_S = 1.0


class LimitedHttpProtocol(LimitedParsing):
    """One connection.

    A request that is over a limit is answered as soon as that is known, after the responses to
    those before it, and the connection is closed.
    """

    def __init__(
        self,
        limits: HttpSettings,
        connections: OpenConnections,
        refusals: Refusals,
        **of_uvicorn: Any,
    ) -> None:
        super().__init__(limits, **of_uvicorn)
        self._open = connections
        self._refusals = refusals
        self._client: ClientTransport
        self.address = ""
        # What arrived before it may be parsed.
        self._held = b""
        self._error: StepserveError | None = None
        self._client_is_done = False
        self._working: RequestResponseCycle | None = None
        self._timers = Timers(self.loop)

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, or refuse to."""
        timeout_s = self._limits.send_timeout_s
        self._client = ClientTransport(transport, self.loop, timeout_s, self._has_unread)
        super().connection_made(cast(asyncio.Transport, self._client))
        self.address = "" if self.client is None else self.client[0]
        self._timers.start("head", self._limits.header_timeout_s, self._head_is_late)
        if not self._open.add(self):
            self.refuse(self._too_many())

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever was asked for is wanted no more."""
        self._open.remove(self)
        self._client.lost()
        self._timers.stop_all()
        self._held = b""
        self.pipeline.clear()
        # uvicorn tells the last of several that came at once, which may not be begun.
        self._give_up_working()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what may be parsed now, and keep the rest."""
        if self._error is None and not self.transport.is_closing():
            self._held += data
            self._parse_held()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the responses that its client waits for, if it does."""
        if self._error is not None or self.transport.is_closing() or not self._is_working():
            return False
        self._client_is_done = True
        self._timers.stop("head")
        self._probe(FIRST_PROBE_S)
        return True

    def pause_writing(self) -> None:
        """The client does not take what it is sent; for a while that is all right."""
        super().pause_writing()
        self._timers.start("send", self._limits.send_timeout_s, self._client.abort)

    def resume_writing(self) -> None:
        """It goes on."""
        super().resume_writing()
        self._timers.stop("send")

    # Called by the parser

    def on_headers_complete(self) -> None:
        """The body of a request begins, if it has one."""
        super().on_headers_complete()
        if not self.in_head:
            self._timers.stop("head")

    def on_message_complete(self) -> None:
        """A request is whole, unless it will be parsed again."""
        super().on_message_complete()
        if not self._is_upgrade:
            self._open.work(self)

    # Called by the request in flight, and by others

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def closing_app(scope: Any, receive: Any, send: Any) -> None:
            async def closing_send(message: Any) -> None:
                if cycle.more_body:
                    # Nobody will read the rest: it must not be taken for the next request.
                    cycle.keep_alive = False
                await send(message)

            await app(scope, receive, closing_send)

        self._working = cycle
        super()._start_asgi_task(cycle, closing_app)

    def on_response_complete(self) -> None:
        """One answer is written: go on with what came meanwhile, or end the connection."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._go_on()
        if not self._is_working():
            self._open.await_client(self)
            self._forget_answered()

    def give_way(self) -> None:
        """Close for another connection's sake."""
        if self._has_unread() and not self._is_answering() and not self.transport.is_closing():
            self._client.write(self._respond_with(self._too_many()))
        self._client.drop()

    # Inside

    def _forget_answered(self) -> None:
        """A connection that waits for its next request holds nothing of the one before."""
        if self.cycle.more_body or not self.cycle.response_complete:
            return
        if self.scope is self.cycle.scope:
            self.scope = None  # type: ignore[assignment]
        self.cycle = None  # type: ignore[assignment]
        self._working = None

    def _go_on(self) -> None:
        is_busy = self._working is not None and not self._working.response_complete
        if is_busy or self._error is None:
            self._parse_held()
        else:
            self._respond_with_error(self._error)
        if self._client_is_done and not is_busy and not self._is_working():
            self.transport.close()

    def _parse_held(self) -> None:
        """Parse until there is nothing more, or a request must wait for the one before it."""
        if not self._held:
            return
        self._unset_keepalive_if_required()
        if self.in_head:
            self._timers.start_once("head", self._limits.header_timeout_s, self._head_is_late)
        data, position = memoryview(self._held), 0
        self._held = b""
        while position < len(data) and self._may_parse():
            piece = data[position : position + self.next_bytes()]
            position += len(piece)
            self.parse(piece)
        if position < len(data) and self._error is None:
            self._held = bytes(data[position:])
            self.flow.pause_reading()

    def _may_parse(self) -> bool:
        return self._error is None and not self.pipeline and not self.transport.is_closing()

    def _is_working(self) -> bool:
        """Whether there is a whole request that is not answered."""
        working = self._working
        return working is not None and not working.response_complete and not working.more_body

    def _is_answering(self) -> bool:
        working = self._working
        return working is not None and working.response_started and not working.response_complete

    def _has_unread(self) -> bool:
        """Whether the client may still be sending a request, which it has begun."""
        if self._client_is_done:
            return False
        is_within = not self.in_head or bool(self._held) or self.loose_bytes > 0
        return is_within or self._error is not None

    def _head_is_late(self) -> None:
        if self._held or self.pipeline:
            # Not the client's fault: it waits for its turn.
            self._timers.start("head", self._limits.header_timeout_s, self._head_is_late)
        elif self.loose_bytes:
            limit_s = self._limits.header_timeout_s
            message = f"URL and headers did not arrive within {limit_s:g} s, which is the limit"
            self.refuse(SlowRequestError(message))
        elif not self._is_working():
            self.transport.close()

    def _too_many(self) -> TooManyConnectionsError:
        message = f"{self._open.most} connections are open, which is the limit; try again"
        return TooManyConnectionsError(message, RETRY_S)

    def refuse(self, error: StepserveError) -> None:
        """Parse nothing more, and answer with `error` once those before are answered."""
        if self._error is not None:
            return
        self._error = error
        self._held = b""
        self._timers.stop("head")
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        if not self._is_working():
            self._respond_with_error(error)

    def _respond_with_error(self, error: StepserveError) -> None:
        self._open.await_client(self)
        if self._is_answering():
            self._client.abort()
            return
        self._give_up_working()
        self._client.write(self._respond_with(error))
        self._client.close()

    def _respond_with(self, error: StepserveError) -> bytes:
        return self._refusals.answer(error, self.server_state.default_headers)

    def _give_up_working(self) -> None:
        """Tell the request in flight that its client is gone."""
        if self._working is not None and not self._working.response_complete:
            self._working.disconnected = True
            self._working.message_event.set()

    def _probe(self, next_s: float) -> None:
        """Find out whether a client that will send no more still reads, and ask again later."""
        working = self._working
        if working is None or not self._is_working():
            return
        if not working.response_started or working.chunked_encoding:
            self._client.probe(in_chunks=working.response_started)
        self._timers.start("probe", next_s, lambda: self._probe(next_s * PROBE_FACTOR))
