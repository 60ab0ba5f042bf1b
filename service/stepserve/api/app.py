"""Puts the HTTP API together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware

from stepserve import __version__
from stepserve.api.auth.access import Access, UsageMiddleware, identify
from stepserve.api.auth.cross_origin import CrossOriginMiddleware, check_site
from stepserve.api.backend import Backend
from stepserve.api.bodies.pending_bytes import (
    BodyTurns,
    BodyTurnsMiddleware,
    PendingBytes,
    PendingBytesMiddleware,
)
from stepserve.api.bodies.schemas import (
    EditRequest,
    ImageRequest,
    UpscaleRequest,
    VariationRequest,
)
from stepserve.api.errors import UnauthorizedError
from stepserve.api.handlers import add_error_handlers
from stepserve.api.http.head_limits import check_head
from stepserve.api.http.in_flight import InFlight, InFlightMiddleware
from stepserve.api.http.methods import HeadMiddleware
from stepserve.api.http.middleware import (
    BodyLimitMiddleware,
    ChecksMiddleware,
    ErrorMiddleware,
    RequestIdMiddleware,
)
from stepserve.api.inputs.fetch import FetchTurns
from stepserve.api.observe.exchanges import Observation, ObservationMiddleware
from stepserve.api.openapi import add_schemas, error_responses
from stepserve.api.results.store import ResultStore
from stepserve.api.routes import (
    docs,
    health,
    images,
    metrics,
    models,
    playground,
    requests,
    results,
)
from stepserve.config import Settings

EXPOSED_HEADERS = (
    "X-Request-ID",
    "Server-Timing",
    "Retry-After",
    "traceparent",
    "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining-Requests",
    "X-RateLimit-Reset-Requests",
)

KEY_SCHEME = HTTPBearer(
    scheme_name="ApiKey",
    description="An API key, as the operator of this server hands them out.",
    auto_error=False,
)

DESCRIPTION = """\
A diffusion-model server that batches requests at every denoising step.

Routes and shapes are those of OpenAI's Images API, so its clients work unchanged. Every error
has the body `{"error": {"message", "type", "param", "code"}}`, and every response an
`X-Request-ID`.
"""

TAGS = [
    {"name": "images", "description": "Make, change and vary images, as OpenAI's Images API."},
    {"name": "requests", "description": "Watch and end requests by their `X-Request-ID`."},
    {"name": "models", "description": "What is served, what it can do, and what it is doing."},
    {"name": "results", "description": "Images that were returned as links."},
    {"name": "health", "description": "For load balancers and supervisors."},
]
NOT_OBSERVED = Observation()
SERVERS = [{"url": "/", "description": "Where this document comes from."}]


def create_app(
    backend: Backend,
    settings: Settings,
    store: ResultStore,
    access: Access,
    observation: Observation = NOT_OBSERVED,
    *,
    echo_request_id: bool = True,
) -> FastAPI:
    """Return the app that serves `backend` over HTTP to those who have `access`.

    Results that are answered as links are kept in `store`. `echo_request_id` is turned off behind a
    proxy that already adds `X-Request-ID` to every response, as Ray Serve's does.
    """
    in_flight = InFlight()
    app = FastAPI(
        title="Stepserve",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_tags=TAGS,
        servers=SERVERS,
        # What client generators call the function: `create_images`.
        generate_unique_id_function=lambda route: route.name,
        # A redirect would lose the body of a POST, or lead past a proxy: a wrong URL is a 404.
        redirect_slashes=False,
        middleware=[
            Middleware(InFlightMiddleware, in_flight=in_flight),
            *_middleware(settings, access, observation, echo_request_id),
        ],
        lifespan=_lifespan,
    )
    app.state.backend = backend
    app.state.settings = settings
    app.state.store = store
    app.state.fetches = FetchTurns()
    app.state.observation = observation
    app.state.in_flight = in_flight
    add_error_handlers(app)
    keys: dict[str, Any] = {}
    if access.keys.keys:
        # For the document. They are checked elsewhere, before any body is read.
        keys["dependencies"] = [Security(KEY_SCHEME)]
        keys["responses"] = error_responses(UnauthorizedError)
    for part in (images, requests, models):
        app.include_router(part.router, **keys)
    for part in (results, health, metrics, docs, playground):
        app.include_router(part.router)
    app.mount(docs.ASSETS_URL, docs.ASSETS)
    app.mount(playground.ASSETS_URL, playground.ASSETS)
    add_schemas(app, ImageRequest, EditRequest, VariationRequest, UpscaleRequest)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await app.state.backend.start()
    sweeping = asyncio.create_task(app.state.store.sweep_for_ever())
    try:
        yield
    finally:
        sweeping.cancel()


def _middleware(
    settings: Settings, access: Access, observation: Observation, echo_request_id: bool
) -> list[Middleware]:
    http, most_pending_bytes = settings.http, settings.uploads.max_pending_bytes
    cors = Middleware(
        CrossOriginMiddleware,
        allow_origins=http.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        # A public page that calls a server of a private network: the operator named the page.
        allow_private_network=True,
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )
    checks = (
        partial(check_head, limits=http),
        partial(check_site, origins=http.cors_origins),
        partial(identify, keys=access.keys),
    )
    return [
        *([cors] if http.cors_origins else []),
        Middleware(RequestIdMiddleware, echo=echo_request_id),
        Middleware(ObservationMiddleware, observation=observation),
        Middleware(ErrorMiddleware),
        Middleware(ChecksMiddleware, checks=checks),
        Middleware(BodyTurnsMiddleware, turns=BodyTurns(most_pending_bytes)),
        Middleware(BodyLimitMiddleware, limits=http),
        Middleware(PendingBytesMiddleware, pending=PendingBytes(most_pending_bytes)),
        Middleware(UsageMiddleware, usage=access.usage),
        Middleware(HeadMiddleware),
    ]
