"""ASGI middleware, outermost first: request id, answers to bugs, body limit."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.domain.errors import BodyTooLargeError

REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(scope: Scope) -> str:
    """Return the id that the caller knows this request by."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestIdMiddleware:
    """Keeps a usable `X-Request-ID` of the client or makes one, and puts it in the answer."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection under its id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _choose_id(Headers(scope=scope).get(REQUEST_ID_HEADER, ""))
        scope.setdefault("state", {})["request_id"] = request_id
        tell = _with_header(send, REQUEST_ID_HEADER, request_id) if self._echo else send
        return await self._app(scope, receive, tell)


class UnexpectedErrorMiddleware:
    """Answers a bug with a 500 that tells nothing but the request id; the log has the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, and never leave it unanswered."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            # Every answer here is sent whole, so an error means that none was begun.
            await error_response(error, request_id_of(scope))(scope, receive, send)


class BodyLimitMiddleware:
    """Reads the whole body before anything else runs, and refuses one over `max_bytes`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or answer 413."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check(_declared_bytes(scope))
            body = await self._read(receive)
        except BodyTooLargeError as error:
            return await error_response(error, request_id_of(scope))(scope, receive, send)
        except ClientDisconnect:
            return None
        return await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        """Count what arrives: the declared length is only a hint, and chunks declare none."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            self._check(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise BodyTooLargeError(
                f"the body is {size_bytes} bytes long or more; the limit is {self._max_bytes} bytes"
            )


def _choose_id(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _with_header(send: Send, name: str, value: str) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[name] = value
        await send(message)

    return send_with_header


def _declared_bytes(scope: Scope) -> int:
    declared = Headers(scope=scope).get("content-length", "")
    return int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, then whatever else comes (a disconnect)."""
    first: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(first, None) or await receive()

    return replay
