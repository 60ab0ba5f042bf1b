"""Take the README's images of the playground from a running service.

python docs/make_screenshots.py http://127.0.0.1:8000
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent / "images"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VIEWS = {
    "playground-light": (1360, 860, "light"),
    "playground-dark": (1360, 860, "dark"),
    "playground-phone": (390, 844, "light"),
}
# Some requests have left by then, so that both joining and leaving are in the image.
DONE = "document.querySelectorAll('.card [aria-label=Download]').length"


def main(url: str) -> None:
    """Run the six requests of the page, and look at it while some of them still run."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        for name, (width, height, scheme) in VIEWS.items():
            size = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(url)
            until(page, "document.getElementById('status').textContent.includes('is ready')")
            page.click("#demo")
            until(page, f"{DONE} >= 3")
            keep(page, name, "#stage" if width < 500 else "body")
            until(page, f"{DONE} === 6")
            page.close()
        browser.close()


def keep(page: Any, name: str, top: str) -> None:
    """Write what the page shows from an element on, without loss."""
    page.evaluate("e => document.querySelector(e).scrollIntoView({behavior: 'instant'})", top)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.save(FOLDER / f"{name}.png", optimize=True)


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true."""
    while not page.evaluate(expression):
        page.wait_for_timeout(50)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
