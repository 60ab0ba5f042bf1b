"""ASGI middleware, outermost first: request id, responses to errors, checks, body limit."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepserve.api.bodies.content_coding import inflater_of
from stepserve.api.bodies.reading import (
    JSON,
    Body,
    BodyBudget,
    BodyReader,
    check_length,
    declared_bytes,
    media_type_of,
)
from stepserve.api.errors import error_response
from stepserve.api.request_id import REQUEST_ID_HEADER, request_id_of, with_headers
from stepserve.config import HttpSettings

TURNS = 10
"""Of the event loop between two long bodies: a short request takes no more."""

UPLOADS = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/images/upscale",
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIdMiddleware:
    """Keeps a usable `X-Request-ID` of the client or makes one, and puts it in the response."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection under its id."""
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        tell = with_headers(send, {REQUEST_ID_HEADER: request_id}) if self._echo else send
        return await self._app(scope, receive, tell)


class ErrorMiddleware:
    """Responds to errors of the middleware inside it, and to bugs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, and never leave it unanswered."""
        has_begun = False

        async def noticed(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            if has_begun:
                # A stream: the server cuts it off, which is all that can still be told.
                raise
            await error_response(error, request_id_of(scope))(scope, receive, send)


class ChecksMiddleware:
    """Looks at each request before any body is read: a check raises the error to respond with."""

    def __init__(self, app: ASGIApp, *, checks: tuple[Callable[[Scope], None], ...]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection if all checks return."""
        for check in self._checks:
            check(scope)
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Reads the whole body before anything else runs, and refuses one over the limits.

    Its length is limited to `max_upload_bytes` for URLs that take images, `max_body_bytes` for all
    others. What the app sees of it is never compressed.
    """

    def __init__(self, app: ASGIApp, *, limits: HttpSettings) -> None:
        self._app = app
        self._limits = limits
        self._reader = BodyReader(limits.body_timeout_s, BodyBudget(limits.max_bodies_bytes))
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection.

        Raises:
            StepserveError: its body is not as it must be (400, 408, 413, 415 or 503).
        """
        try:
            body = await self._read(scope, receive)
        except ClientDisconnect:
            return None
        scope["state"]["body_bytes"] = body.size_bytes
        return await self._app(scope, self._replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> Body:
        headers = Headers(scope=scope)
        limits = self._limits
        is_upload = scope["path"] in UPLOADS
        limit_bytes = limits.max_upload_bytes if is_upload else limits.max_body_bytes
        body = Body(limit_bytes, is_json=media_type_of(headers) == JSON)
        inflater = inflater_of(headers, limit_bytes)
        check_length(declared_bytes(headers), limit_bytes)
        await self._reader.read(receive, inflater, body)
        return body

    def _replay(self, body: Body, receive: Receive) -> Receive:
        """Return a `receive` that gives the body once, then whatever else comes (a disconnect).

        A long one comes in parts, as forms are read part by part, and its last part waits its turn:
        what is done at once with many of them, such as reading JSON, would hold up all others.
        """
        parts = body.parts[::-1] or [bytearray()]
        body.parts.clear()
        is_long = len(parts) > 1

        async def replay() -> Message:
            if not parts:
                return await receive()
            part = parts.pop()
            if parts:
                await asyncio.sleep(0)
            elif is_long:
                await self._take_turn()
            return {"type": "http.request", "body": bytes(part), "more_body": bool(parts)}

        return replay

    async def _take_turn(self) -> None:
        """Return once all others have had some turns of the event loop."""
        async with self._turn:
            for _ in range(TURNS):
                await asyncio.sleep(0)
