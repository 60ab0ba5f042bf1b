"""What routes are given: the collaborators, and the checks before a body is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, cast

from fastapi import Depends, Request

from stepserve.api.auth.keys import Caller
from stepserve.api.backend import Backend
from stepserve.api.bodies.pending_bytes import Hold
from stepserve.api.bodies.reading import JSON, media_type_of
from stepserve.api.errors import UnsupportedMediaTypeError
from stepserve.api.http.in_flight import InFlight
from stepserve.api.inputs.fetch import FetchTurns
from stepserve.api.results.store import ResultStore
from stepserve.config import Settings
from stepserve.domain.checks.wording import did_you_mean, shown
from stepserve.domain.errors import NotReadyError, UnknownModelError
from stepserve.domain.model_status import ModelStatus

FORM = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
DECLARED_BY_CURL: Mapping[str, str] = MappingProxyType(
    {
        FORM: "to send a form, use -F instead",
        JSON: "to send JSON, add -H 'Content-Type: application/json'",
    }
)

NO_REASON = "no reason given"
READY_RETRY_S = 5.0
"""When to ask a loading model again: loading takes seconds to minutes."""


@dataclass(frozen=True)
class Incoming:
    """One request as it came in, and what is there to serve it.

    `caller` is whose API key it came with: anybody's, where there are none.
    """

    http: Request
    backend: Backend
    settings: Settings
    store: ResultStore
    caller: Caller
    request_id: str
    fetches: FetchTurns
    hold: Hold

    @property
    def stopped(self) -> asyncio.Event:
        """Set when the server stops, and waits for nothing any longer."""
        return cast(InFlight, self.http.app.state.in_flight).stopped

    async def link(self, data: bytes, media_type: str) -> str:
        """Keep a file for a while, and return where it is.

        Raises:
            ResultsUnavailableError: it cannot be kept.
        """
        path = await self.store.put(data, media_type)
        prefix = self.settings.results.public_url or str(self.http.base_url)
        return prefix.rstrip("/") + path


def get_incoming(request: Request) -> Incoming:
    """Return everything a route needs to know of the request."""
    state = request.app.state
    return Incoming(
        http=request,
        backend=state.backend,
        settings=state.settings,
        store=state.store,
        caller=request.state.caller,
        request_id=request.state.request_id,
        fetches=state.fetches,
        hold=request.state.hold,
    )


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON.

    Raises:
        UnsupportedMediaTypeError: the `Content-Type` is missing or another one.
    """
    declared_type(request, JSON)


def declared_type(request: Request, *known: str) -> str:
    """Return the media type of the body.

    Raises:
        UnsupportedMediaTypeError: the `Content-Type` is missing or none of the known.
    """
    given = request.headers.get("content-type", "")
    media_type = media_type_of(request.headers)
    if not given or media_type not in known:
        wanted = " or ".join(map(repr, known))
        got = shown(given) if given else "none"
        how = _how_to_declare(known) if media_type == URLENCODED else ""
        raise UnsupportedMediaTypeError(f"Content-Type must be {wanted}, got {got}{how}")
    return media_type


def _how_to_declare(known: Sequence[str]) -> str:
    ways = "; or ".join(DECLARED_BY_CURL[media_type] for media_type in known)
    return f". This is how curl sends what stands after -d: {ways}"


IncomingDep = Annotated[Incoming, Depends(get_incoming)]


async def find_model(backend: Backend, name: str) -> ModelStatus:
    """Return the status of the model with this id or alias.

    Raises:
        UnknownModelError: no such model; the message lists those there are.
    """
    # To ask for one that is not known makes the backend look for new ones, with their aliases.
    status = await _named(backend, name) or await _named(backend, name)
    if status is None:
        models = [status.capabilities for status in await backend.models()]
        served = [*(model.id for model in models), *(a for model in models for a in model.aliases)]
        raise UnknownModelError(
            f"no model {shown(name)}{did_you_mean(name, served)} "
            f"(served: {', '.join(served) or 'none'})",
            "model",
        )
    return status


async def _named(backend: Backend, name: str) -> ModelStatus | None:
    models = [status.capabilities for status in await backend.models()]
    named = (model.id for model in models if name in model.aliases)
    return await backend.model(next(named, name))


def require_ready(statuses: list[ModelStatus]) -> None:
    """Return if every model takes requests.

    Raises:
        NotReadyError: names the models that do not, and why.
    """
    waiting = [status for status in statuses if not status.ready]
    if waiting or not statuses:
        parts = [f"{status.capabilities.id} ({status.detail or NO_REASON})" for status in waiting]
        raise NotReadyError(f"not ready: {', '.join(parts) or 'no model is served'}", READY_RETRY_S)
