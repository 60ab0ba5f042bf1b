"""Which pages from elsewhere may call from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

ALLOW_PRIVATE_NETWORK = "Access-Control-Allow-Private-Network"


class CrossOriginMiddleware(CORSMiddleware):
    """As Starlette has it, but tells of private networks to those pages only that may call."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks for a page."""
        response = super().preflight_response(request_headers)
        if not self.is_allowed_origin(request_headers["origin"]):
            del response.headers[ALLOW_PRIVATE_NETWORK]
        return response
