"""What the HTTP door must be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiSettings:
    """Limits and defaults of the HTTP door.

    `default_model` serves requests that name no model. `echo_request_id` is turned off behind a
    proxy that already adds `X-Request-ID` to every answer, as Ray Serve's does.
    """

    default_model: str
    max_body_bytes: int = 1_048_576
    request_timeout_s: float = 600.0
    echo_request_id: bool = True
