"""`GET /docs`: Swagger UI from files installed with the service, so that it works offline."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

ASSETS_URL = "/docs/assets"
ASSETS = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")

PAGE = bytes(
    get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Stepserve API",
        swagger_js_url=f"{ASSETS_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS_URL}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS_URL}/favicon.png",
    ).body
)


def script_hashes(page: bytes) -> str:
    """The scripts that are written into a page, as a Content-Security-Policy allows them."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = (b64encode(hashlib.sha256(script).digest()).decode() for script in scripts)
    return " ".join(f"'sha256-{value}'" for value in hashes)


HEADERS = {
    # Nothing from elsewhere, no script but the files above and what FastAPI wrote into the page.
    # Swagger UI's icons are data.
    "Content-Security-Policy": (
        f"default-src 'self'; script-src 'self' {script_hashes(PAGE)}; "
        "img-src 'self' data: blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Every URL, to read about and to try."""
    return HTMLResponse(PAGE, headers=HEADERS)
