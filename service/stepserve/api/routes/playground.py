"""`GET /`: the playground, one page of static files."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[1] / "playground"
ASSETS_URL = "/playground"

ASSET_HEADERS = {
    # Kept by browsers, and asked for again by ETag: a new version of the service is seen at once.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
HEADERS = ASSET_HEADERS | {
    # Nothing from elsewhere, and no script but our own files. Images arrive as data and blobs.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


class Assets(StaticFiles):
    """Files of the page."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """The file, or 304 where the browser has it."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(ASSET_HEADERS)
        return response


ASSETS = Assets(directory=FOLDER)


@router.get("/")
async def playground() -> FileResponse:
    """Make images, and watch the batch that makes them."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)
