"""Who calls, and whether it is their turn."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

# As the router itself finds the path below a prefix: if it were found otherwise, some would get in.
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stepserve.api.auth.keys import ANYBODY, ApiKey, KeyRing, caller_of_key
from stepserve.api.auth.usage import Rate, Refusal, Usage
from stepserve.api.errors import KeyLimitError, UnauthorizedError, error_response
from stepserve.api.request_id import request_id_of, with_headers

GUARDED = "/v1/"
LINKS = "/v1/results/"
"""Signed links are their own permission."""

COUNTED = "/v1/images/"
SCHEME = "bearer"


@dataclass(frozen=True)
class Access:
    """The keys that let callers in, and where their use is counted."""

    keys: KeyRing
    usage: Usage


def identify(scope: Scope, keys: KeyRing) -> None:
    """Note in `scope` who calls. Without keys everybody may.

    Raises:
        UnauthorizedError: the request has no key, or a wrong one.
    """
    scope["state"]["caller"] = ANYBODY
    # The browser asks for permission without a key.
    if not keys.keys or not _is_guarded(scope) or scope["method"] == "OPTIONS":
        return
    key = keys.find(_token(scope))
    if key is None:
        raise UnauthorizedError(_how_to_come_in(scope))
    scope["state"]["caller"] = caller_of_key(key)
    if key.has_limits and get_route_path(scope).startswith(COUNTED):
        scope["state"]["limited_key"] = key


class KeyUse:
    """What one HTTP exchange uses of its API key's limits: a place for each request in it.

    `headers` tell what the key may still do; they are kept up to date.
    """

    def __init__(self, usage: Usage, key: ApiKey) -> None:
        self._usage = usage
        self._key = key
        self.headers: dict[str, str] = {}

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Count a request for as long as this is open.

        Raises:
            KeyLimitError: the key may not have another one now.
            NotReadyError: nobody counts.
        """
        lease = secrets.token_hex(16)
        try:
            answer = await self._usage.take(self._key, lease)
            self.headers.update(_limits(answer.rate))
            if isinstance(answer, Refusal):
                raise KeyLimitError(answer.message, answer.retry_after_s)
            yield
        finally:
            self._usage.give_back(self._key.name, lease)


def key_use_of(scope: Scope) -> KeyUse | None:
    """What an exchange uses of its key's limits; None where the key has none."""
    use: KeyUse | None = scope["state"].get("key_use")
    return use


class UsageMiddleware:
    """Counts what keys with limits use, once a body has arrived: half of one takes no place."""

    def __init__(self, app: ASGIApp, *, usage: Usage) -> None:
        self._app = app
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or respond with 429.

        Raises:
            NotReadyError: nobody counts.
        """
        key: ApiKey | None = scope.get("state", {}).get("limited_key")
        if key is None:
            return await self._app(scope, receive, send)
        use = scope["state"]["key_use"] = KeyUse(self._usage, key)
        send = with_headers(send, use.headers)
        try:
            async with use.place():
                await self._app(scope, receive, send)
        except KeyLimitError as error:
            await error_response(error, request_id_of(scope))(scope, receive, send)


def _is_guarded(scope: Scope) -> bool:
    path = get_route_path(scope)
    return path.startswith(GUARDED) and not path.startswith(LINKS)


def _token(scope: Scope) -> str:
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == SCHEME else ""


def _how_to_come_in(scope: Scope) -> str:
    if "authorization" in Headers(scope=scope):
        return "the API key is wrong"
    return "an API key is required: send it as 'Authorization: Bearer KEY'"


def _limits(rate: Rate | None) -> dict[str, str]:
    if rate is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.remaining),
        "x-ratelimit-reset-requests": f"{math.ceil(rate.reset_s)}s",
    }
