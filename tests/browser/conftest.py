"""Real Chromium on pages that a real server serves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stepping_site import CHROMIUM, OPTIONS, Site, SteppingBackend, Watched, serve


@pytest.fixture
def site() -> Iterator[Site]:
    yield from serve(SteppingBackend())


# Not for longer than a module: Playwright holds the event loop of the thread meanwhile.
@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield launched
        launched.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def blank_page(browser, site: Site, watched: Watched):
    """In a browser of its own; whatever is opened must log no error and ask no other host."""
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.on("console", lambda m: watched.problems.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: watched.problems.append(str(error)))
    opened.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((site.url, "data:", "blob:"))
            else watched.problems.append(r.url)
        ),
    )
    yield opened
    context.close()
    assert watched.problems == []


@pytest.fixture
def page(blank_page, site: Site):
    """The playground."""
    blank_page.goto(site.url)
    return blank_page
