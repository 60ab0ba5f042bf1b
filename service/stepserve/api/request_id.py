"""The id that a caller knows an HTTP request by."""

from __future__ import annotations

from starlette.types import Scope

REQUEST_ID_HEADER = "X-Request-ID"


def request_id_of(scope: Scope) -> str:
    """Return the id that the caller knows this request by."""
    request_id: str = scope["state"]["request_id"]
    return request_id
