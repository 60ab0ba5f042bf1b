"""Which pages from elsewhere may call from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepserve.api.errors import CrossSiteError, error_response
from stepserve.api.request_id import request_id_of
from stepserve.domain.limits import shown

ALLOW_PRIVATE_NETWORK = "Access-Control-Allow-Private-Network"
ANY_ORIGIN = "*"
READING = ("GET", "HEAD", "OPTIONS")
ELSEWHERE = ("cross-site", "same-site")
"""What browsers say in `Sec-Fetch-Site` of a page that is not of this server."""


class CrossOriginMiddleware(CORSMiddleware):
    """As Starlette has it, but tells of private networks to those pages only that may call."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a browser that asks for a page."""
        response = super().preflight_response(request_headers)
        if not self.is_allowed_origin(request_headers["origin"]):
            del response.headers[ALLOW_PRIVATE_NETWORK]
        return response


class CrossSiteMiddleware:
    """Refuses what pages from elsewhere send without asking first.

    A browser asks before it sends JSON, but not before it sends a form. The page would not see the
    answer, but the work would be done.

    Args:
        origins: of the pages that may.
    """

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or answer 403."""
        if not self._is_from_elsewhere(scope):
            return await self._app(scope, receive, send)
        origin = shown(Headers(scope=scope).get("origin", ""))
        error = CrossSiteError(f"pages of {origin} may not call; http.cors_origins names who may")
        return await error_response(error, request_id_of(scope))(scope, receive, send)

    def _is_from_elsewhere(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        if scope["method"] in READING or headers.get("sec-fetch-site") not in ELSEWHERE:
            return False
        return self._origins.isdisjoint({ANY_ORIGIN, headers.get("origin", "")})
