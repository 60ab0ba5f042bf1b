"""What the HTTP API must be told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from stepserve.api.exchange_context import ExchangeListener
from stepserve.api.http.head_limits import HeadLimits
from stepserve.api.inputs.uploads import UploadLimits
from stepserve.telemetry.tracing import HttpTraces


@dataclass(frozen=True)
class Observation:
    """Who hears of HTTP exchanges, where `/metrics` comes from, and what begins spans.

    None shows no metrics, and traces nothing.
    """

    listeners: tuple[ExchangeListener, ...] = ()
    read_metrics: Callable[[], Awaitable[str]] | None = None
    traces: HttpTraces | None = None


@dataclass(frozen=True)
class ApiSettings:
    """Limits and defaults of the HTTP API.

    `default_model` serves requests that name no model. `echo_request_id` is turned off behind a
    proxy that already adds `X-Request-ID` to every response, as Ray Serve's does. `public_url`
    begins links to results; empty: as the client addressed the server. Pages of `cors_origins` may
    call from a browser. `max_bodies_bytes` may be received at a time, each body within
    `body_timeout_s`.
    """

    default_model: str
    max_body_bytes: int = 1_048_576
    max_upload_bytes: int = 20_971_520
    max_bodies_bytes: int = 268_435_456
    body_timeout_s: float = 120.0
    head: HeadLimits = field(default_factory=HeadLimits)
    uploads: UploadLimits = field(default_factory=UploadLimits)
    request_timeout_s: float = 600.0
    echo_request_id: bool = True
    public_url: str = ""
    cors_origins: tuple[str, ...] = ()
