"""`GET /`: the playground, one page of static files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[1] / "playground"
ASSETS_URL = "/playground"
ASSETS = StaticFiles(directory=FOLDER)

HEADERS = {
    # Nothing from elsewhere, and no script but our own files. Pictures arrive as data and blobs.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def playground() -> FileResponse:
    """Make pictures, and watch the batch that makes them."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)
