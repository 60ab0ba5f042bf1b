"""`GET /v1/results/{name}`: images and trajectories by signed link."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from stepserve.api.dependencies import IncomingDep
from stepserve.api.openapi import error_responses
from stepserve.api.results.store import (
    MEDIA_TYPES,
    LinkExpiredError,
    ResultNotFoundError,
    WrongSignatureError,
)

router = APIRouter(tags=["results"])

_FILE = {"schema": {"type": "string", "format": "binary"}}


# Clients and proxies ask with HEAD for size and type; the document tells of GET alone.
@router.head("/v1/results/{name}", include_in_schema=False)
@router.get(
    "/v1/results/{name}",
    summary="Fetch an image by its link",
    response_class=Response,
    responses=error_responses(WrongSignatureError, ResultNotFoundError, LinkExpiredError)
    | {
        200: {
            "description": "The file.",
            "content": dict.fromkeys(MEDIA_TYPES.values(), _FILE),
        }
    },
)
async def fetch_result(
    name: str,
    incoming: IncomingDep,
    signature: Annotated[str, Query(description="As the link has it.")] = "",
) -> Response:
    """The links of responses with `response_format: url` lead here, and need no API key."""
    data, media_type, left_s = await incoming.store.get(name, signature)
    headers = {
        "Content-Length": str(len(data)),
        "Cache-Control": f"private, max-age={left_s}, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
    }
    body = b"" if incoming.http.method == "HEAD" else data
    return Response(body, media_type=media_type, headers=headers)
