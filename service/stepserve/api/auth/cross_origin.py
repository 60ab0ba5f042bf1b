"""Which pages from elsewhere may call from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from stepserve.api.errors import CrossSiteError
from stepserve.domain.checks.wording import shown

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


def check_site(scope: Scope, origins: tuple[str, ...]) -> None:
    """Return if a request is none that a page from elsewhere sends without asking first.

    A browser asks before it sends JSON, but not before it sends a form. The page would not see the
    response, but the work would be done.

    Args:
        origins: of the pages that may.

    Raises:
        CrossSiteError: it is one, and its page may not.
    """
    headers = Headers(scope=scope)
    if scope["method"] in READING or headers.get("sec-fetch-site") not in ELSEWHERE:
        return
    origin = headers.get("origin", "")
    if ANY_ORIGIN not in origins and origin not in origins:
        raise CrossSiteError(
            f"pages of {shown(origin)} may not call; http.cors_origins names who may"
        )
