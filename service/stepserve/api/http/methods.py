"""Which methods a path has; and `HEAD`, which every path has that `GET` has."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTED = ("DELETE", "GET", "PATCH", "POST", "PUT")
OF_A_ROUTE = ("route", "endpoint", "path_params")
"""What the router notes in a scope."""


def allowed_methods(app: Starlette, scope: Scope) -> list[str]:
    """Every method that the path of a request has, whichever method it was sent with."""
    found = [method for method in ROUTED if _is_routed(app, scope, method)]
    if _is_routed(app, scope, "NONE"):
        # A folder of files: it matches every method.
        found = ["GET"]
    return sorted([*found, "HEAD"]) if "GET" in found else found


def _is_routed(app: Starlette, scope: Scope, method: str) -> bool:
    # A folder that has looked at it has moved the root of the scope to its own.
    root_path = scope.get("app_root_path", scope.get("root_path", ""))
    asked = dict(scope, method=method, root_path=root_path)
    return any(route.matches(asked)[0] is Match.FULL for route in app.routes)


class HeadMiddleware:
    """Answers `HEAD` as `GET`, with the same headers and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["method"] != "HEAD":
            return await self._app(scope, receive, send)
        as_get = dict(scope, method="GET")
        response = _Head(receive, send)
        try:
            await self._app(as_get, response.receive, response.send)
        finally:
            scope.update({name: as_get[name] for name in OF_A_ROUTE if name in as_get})


class _Head:
    """A response that ends with its headers; whoever would write on finds the client gone."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._is_read = False
        self._ended = asyncio.Event()

    async def receive(self) -> Message:
        if self._is_read:
            await self._ended.wait()
            return {"type": "http.disconnect"}
        self._is_read = True
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(message)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            self._ended.set()
