"""The playground as people use it, in real Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stepping_site import SteppingBackend, picture, serve

from service.api.keys import ApiKey, hash_key
from service.domain.errors import ServerFullError
from service.domain.events import Failed
from service.domain.requests import Task

WAIT_S = 20.0


def until(page: Any, expression: str, arg: object = None) -> None:
    """Wait until an expression is true. Playwright's own way is `eval`, which the page forbids."""
    deadline_s = time.monotonic() + WAIT_S
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline_s, expression
        page.wait_for_timeout(40)


def ready(page: Any) -> None:
    until(page, "document.getElementById('status').textContent.includes('is ready')")


def finish(page: Any, cards: int = 1) -> None:
    until(
        page,
        "n => document.querySelectorAll('.card .actions button').length"
        " && [...document.querySelectorAll('.card')].filter("
        "c => c.textContent.includes('Download')).length === n",
        arg=cards,
    )


def slow(site: Any, step_s: float) -> None:
    site.backend.step_s = step_s


def test_a_picture_appears_step_by_step(page: Any, site: Any):
    slow(site, 0.05)
    ready(page)
    page.fill("#prompt", "a cat")
    page.fill("#seed", "7")
    page.click("#run")
    page.wait_for_selector(".card .frames img[src^='data:image/png']")
    until(page, "/step [0-9]+ of 20/.test(document.querySelector('.card .news').textContent)")
    finish(page)

    [request] = site.backend.requests
    assert (request.prompt, request.seed, request.previews) == ("a cat", 7, 8)
    shown = page.get_attribute(".card .frames img", "src")
    assert base64.b64decode(shown.split(",")[1]) == picture(200)
    assert "had 50 % of its forwards" in page.inner_text(".card .news")


def test_several_at_once_are_seen_in_the_batch(page: Any, site: Any):
    slow(site, 0.02)
    ready(page)
    page.click("#demo")
    until(page, "document.getElementById('loom-facts').textContent.includes('in hand')")
    finish(page, 5)

    assert len({request.num_inference_steps for request in site.backend.requests}) == 5
    drawn = page.evaluate(
        """() => { const c = document.getElementById('weave');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const colours = new Set();
        for (let i = 0; i < d.length; i += 4)
            if (d[i + 3] > 200) colours.add([d[i], d[i + 1], d[i + 2]].join());
        return colours.size; }"""
    )
    # Requests of the page in their colours, and those of others in grey.
    assert drawn >= 3


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_cancelling(page: Any, site: Any, how: str):
    slow(site, 0.1)
    ready(page)
    page.click("#run")
    page.wait_for_selector(".card .frames img[src^='data:image/png']")
    if how == "button":
        page.get_by_role("button", name="Cancel").click()
    else:
        page.keyboard.press("Escape")
    until(page, "document.querySelector('.card').textContent.includes('cancelled')")

    [request] = site.backend.requests
    progress = site.backend.log.progress(request.id)
    assert progress is not None
    assert progress.state == "cancelled"


def test_what_the_service_says_is_shown(page: Any, site: Any, watched: Any):
    async def refuse(request: Any):
        yield Failed(request.id, ServerFullError("the queue is full", 7))

    site.backend.stream_with = refuse
    ready(page)
    page.click("#run")
    page.wait_for_selector(".news.bad")

    assert page.inner_text(".news.bad") == "the queue is full (try again in 7 s)"
    # The browser itself logs answers of that kind.
    assert [p for p in watched.problems if "429" not in p] == []
    watched.problems.clear()


def test_a_prompt_is_needed(page: Any, site: Any):
    ready(page)
    page.fill("#prompt", "  ")
    page.click("#run")

    assert "Write what" in page.inner_text("#problem")
    assert site.backend.requests == []


def upload(page: Any, size: tuple[int, int] = (64, 64)) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "green").save(buffer, "PNG")
    page.set_input_files(
        "#file", {"name": "a.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    )
    page.wait_for_selector("#editor:not([hidden])")


def test_a_mask_is_painted_white_where_the_brush_was(page: Any, site: Any):
    ready(page)
    upload(page)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, middle, steps=8)
    page.mouse.up()
    page.click("#run")
    finish(page)

    [request] = site.backend.requests
    assert request.task is Task.INPAINTING
    mask = Image.open(io.BytesIO(request.mask_image or b""))
    assert mask.size == (64, 64)
    assert [mask.getpixel(place) for place in ((10, 32), (60, 32), (10, 5))] == [255, 0, 0]


def test_without_a_mask_the_whole_picture_is_changed(page: Any, site: Any):
    ready(page)
    upload(page)
    page.click("#run")
    finish(page)

    [request] = site.backend.requests
    assert (request.task, request.strength) == (Task.IMAGE_TO_IMAGE, 0.8)


def test_the_gallery_survives_a_reload(page: Any, site: Any):
    ready(page)
    page.fill("#prompt", "to be kept")
    page.click("#run")
    finish(page)
    page.reload()
    finish(page)
    page.get_by_role("button", name="Again").click()
    finish(page, 2)

    assert page.locator(".card .caption").all_inner_texts() == ["to be kept"] * 2
    assert site.backend.requests[0].seed == site.backend.requests[1].seed


def test_copies_run_as_they_are(page: Any, site: Any, tmp_path: Path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ready(page)
    page.fill("#prompt", 'it\'s a "cat"')
    page.click("#run")
    finish(page)
    copied = {}
    for name in ("curl", "Python"):
        page.get_by_role("button", name=name).click()
        until(page, "document.querySelector('.actions').textContent.includes('Copied')")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
        until(page, "!document.querySelector('.actions').textContent.includes('Copied')")
    subprocess.run(["bash", "-ec", copied["curl"]], cwd=tmp_path, check=True)
    compile(copied["Python"], "copied", "exec")

    assert json.loads((tmp_path / "answer.json").read_text())["data"]
    assert site.backend.requests[1].prompt == 'it\'s a "cat"'
    assert "openai.OpenAI" in copied["Python"]


def test_light_and_dark(page: Any):
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    page.click("#theme")
    dark = paper()
    page.reload()

    assert light != dark
    assert paper() == dark
    page.click("#theme")
    page.emulate_media(color_scheme="dark")
    assert paper() == light


def test_a_phone_needs_no_scrolling_sideways(page: Any):
    page.set_viewport_size({"width": 375, "height": 740})
    ready(page)
    page.click("#run")
    finish(page)

    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_keyboard_is_enough(page: Any, site: Any):
    ready(page)
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    finish(page)
    page.focus(".card .frames button")
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()

    assert site.backend.requests[0].prompt == "typed"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea')]
        .filter(e => !e.labels.length && !e.getAttribute('aria-label')).map(e => e.id)"""
    )
    assert unnamed == []


def test_a_key_is_asked_for_where_one_is_needed(browser: Any):
    keys = (ApiKey(name="me", sha256=hash_key("sk-mine")),)
    for site in serve(SteppingBackend(), keys):
        page = browser.new_page()
        page.goto(site.url)
        page.wait_for_selector("#key-field:not([hidden])")
        page.fill("#key", "sk-mine")
        page.press("#key", "Tab")
        ready(page)
        page.click("#run")
        finish(page)
        page.close()
        assert site.backend.requests[0].owner == "me"


def test_the_docs_page_works_offline(browser: Any, site: Any):
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site.url}/docs")
    page.wait_for_selector(".opblock-summary-path")
    paths = page.locator(".opblock-summary-path").all_inner_texts()
    page.close()

    assert any(re.search(r"generations", path) for path in paths)
    assert all(url.startswith((site.url, "data:")) for url in asked)
