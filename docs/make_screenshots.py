"""Take the README's pictures of the playground from a running service.

python docs/make_screenshots.py http://127.0.0.1:8000
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent / "images"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VIEWS = {
    "playground-light": (1360, 900, "light"),
    "playground-dark": (1360, 900, "dark"),
    "playground-phone": (390, 844, "light"),
}
WHILE_RUNNING_MS = 3_500


def main(url: str) -> None:
    """Run the five requests of the page, and look at it while they do and when they are done."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        for name, (width, height, scheme) in VIEWS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(url)
            until(page, "document.getElementById('status').textContent.includes('is ready')")
            page.click("#demo")
            page.wait_for_timeout(WHILE_RUNNING_MS)
            page.evaluate("scrollTo(0, 0)")
            if name == "playground-phone":
                until(page, DONE)
                page.evaluate("document.getElementById('stage').scrollIntoView()")
            page.screenshot(path=FOLDER / f"{name}.png")
            until(page, DONE)
            page.close()
        browser.close()


DONE = "[...document.querySelectorAll('.card')].every(c => c.textContent.includes('Again'))"


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true."""
    while not page.evaluate(expression):
        page.wait_for_timeout(50)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
