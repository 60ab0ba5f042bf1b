"""The playground as people use it, in real Chromium."""

from __future__ import annotations

import base64
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_steps import (
    WAIT_S,
    finish,
    ready,
    run_copies,
    shaping,
    slow,
    stroke,
    transfer,
    until,
    upload,
)
from stepping_site import SteppingBackend, drawn_image, serve
from stepserve.api.auth.keys import ApiKey, hash_key
from stepserve.domain.errors import ServerFullError
from stepserve.domain.events import Failed
from stepserve.domain.guidance import CLASSIC, Guidance, StepWork
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import SizeRange, StepRange
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.requests.inputs import decode_inputs


def test_a_image_appears_step_by_step(page: Any, site: Any):
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
    assert base64.b64decode(shown.split(",")[1]) == drawn_image(200)
    assert "50 % of the batch" in page.inner_text(".card .news")


def test_several_at_once_are_seen_in_the_batch(page: Any, site: Any):
    slow(site, 0.05)  # the longest runs for 3 seconds, and the second joins within the first
    ready(page)
    page.click("#demo")
    until(page, "document.querySelectorAll('.card.running').length >= 2")
    until(page, "document.querySelector('.lane b')?.textContent.includes('/')")
    finish(page, 6)

    assert len({request.num_inference_steps for request in site.backend.requests}) == 6
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


def test_skipped_steps_are_hollow_cells(page: Any, site: Any):
    site.backend.skips_every = 3
    slow(site, 0.1)
    ready(page)
    page.fill("#steps", "13")
    page.click("#run")
    until(page, "document.querySelector('.lane b')?.textContent.endsWith(' · 1 skipped')")
    assert "1 of them skipped" in page.get_attribute(".lane b", "title")
    finish(page)

    until(page, "document.querySelector('#loom-facts').textContent === 'nothing is running'")

    # The last forward: two rows of the page's request, one of another, and a skipped step of each.
    tops, middles = page.evaluate(
        """() => { const c = document.getElementById('weave'), context = c.getContext('2d');
        const at = (y) => [...context.getImageData(c.width - 7, y, 1, 1).data];
        const cells = [1, 2, 3, 4, 5].map((cell) => c.height - 14 * cell);
        return [cells.map(at), cells.map((y) => at(y + 6))]; }"""
    )
    own, others = tops[0], tops[2]
    assert own != others
    assert tops == [own, own, others, own, others]
    assert middles[:3] == tops[:3]
    assert all(middle[3] < 50 for middle in middles[3:])


def test_a_step_cache_is_chosen(page: Any, site: Any):
    [status] = site.backend.statuses
    usual = StepCacheUse(StepCacheMethod.MAGCACHE, 0.2)
    methods = tuple(StepCacheMethod)
    told = replace(status.capabilities, step_cache_methods=methods, default_step_cache=usual)
    site.backend.statuses = [ModelStatus(told, ready=True)]
    page.reload()
    ready(page)
    assert page.input_value("#step-cache") == "magcache"
    assert page.input_value("#threshold") == "0.2"

    page.click("#run")
    finish(page)
    page.select_option("#step-cache", "easycache")
    page.fill("#threshold", "0.05")
    page.click("#run")
    finish(page, 2)
    page.fill("#threshold", "")
    page.click("#run")
    finish(page, 3)
    page.select_option("#step-cache", "off")
    assert page.is_disabled("#threshold")
    page.click("#run")
    finish(page, 4)

    asked = [request.step_cache for request in site.backend.requests]
    easycache = StepCacheUse(StepCacheMethod.EASYCACHE, 0.05)
    assert asked == [usual, easycache, StepCacheUse(), None]


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
    progress = site.backend.log.progress(request.key)
    assert progress is not None
    assert progress.state == "cancelled"


def test_what_the_service_says_is_shown(page: Any, site: Any, watched: Any):
    async def refuse(request: Any):
        yield Failed(request.id, ServerFullError("the queue is full", 7))

    site.backend.stream_with = refuse
    ready(page)
    page.click("#run")
    page.wait_for_selector(".news.bad")

    assert page.inner_text(".news.bad") == "the queue is full"
    assert page.locator(".card .actions button").first.is_disabled()
    until(page, "/^Try again in [1-7] s$/.test(document.querySelector('.plain').textContent)")
    # The browser itself logs answers of that kind.
    assert [p for p in watched.problems if "429" not in p] == []
    watched.problems.clear()


def test_a_full_service_is_asked_again(page: Any, site: Any, watched: Any):
    usual = site.backend.stream_with

    async def refuse_once(request: Any):
        site.backend.stream_with = usual
        yield Failed(request.id, ServerFullError("the queue is full", 1))

    site.backend.stream_with = refuse_once
    ready(page)
    page.fill("#prompt", "patience")
    page.click("#run")
    page.get_by_role("button", name="Try again", exact=True).click()
    finish(page)

    assert [request.prompt for request in site.backend.requests] == ["patience"] * 2
    watched.problems[:] = [p for p in watched.problems if "429" not in p]


def test_a_prompt_is_needed(page: Any, site: Any):
    ready(page)
    page.fill("#prompt", "  ")
    page.click("#run")

    assert "Write what" in page.inner_text("#problem")
    assert site.backend.requests == []


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
    mask = decode_inputs(request).mask
    assert mask is not None
    assert mask.size == (64, 64)
    assert [mask.getpixel(place) for place in ((10, 32), (60, 32), (10, 5))] == [255, 0, 0]


@pytest.mark.parametrize("how", ["erased", "cleared"])
def test_a_mask_that_is_gone_again_is_no_mask(page: Any, site: Any, how: str):
    ready(page)
    upload(page)
    stroke(page)
    assert page.inner_text("#mask-hint") == "Only what is painted changes."
    if how == "erased":
        page.click("#erase")
        page.evaluate(
            "() => { const b = document.getElementById('brush'); b.value = 60;"
            " b.dispatchEvent(new Event('input', {bubbles: true})); }"
        )
        stroke(page)
    else:
        page.click("#unmask")
    assert "Nothing is painted" in page.inner_text("#mask-hint")
    page.click("#run")
    finish(page)

    assert site.backend.requests[0].task is Task.IMAGE_TO_IMAGE


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_image_can_be_dropped_and_pasted(page: Any, site: Any, how: str):
    ready(page)
    held = transfer(page, "a.png", "image/png")
    if how == "drop":
        page.dispatch_event("#drop", "drop", {"dataTransfer": held})
    else:
        page.evaluate(
            "held => window.dispatchEvent(new ClipboardEvent('paste', {clipboardData: held}))",
            held,
        )
    page.wait_for_selector("#editor:not([hidden])")
    page.click("#run")
    finish(page)

    assert site.backend.requests[0].task is Task.IMAGE_TO_IMAGE


def test_what_is_no_image_is_refused(page: Any):
    ready(page)
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer(page, "a.txt", "text/plain")})
    page.wait_for_selector("#problem:not([hidden])")

    assert page.inner_text("#problem") == "That file cannot be read as an image."


def test_a_image_is_started_from_again(page: Any, site: Any):
    ready(page)
    page.click("#run")
    finish(page)
    page.get_by_role("button", name="Start from it").click()
    page.wait_for_selector("#editor:not([hidden])")
    page.click("#run")
    finish(page, 2)

    assert site.backend.requests[1].task is Task.IMAGE_TO_IMAGE


def test_without_a_mask_the_whole_image_is_changed(page: Any, site: Any):
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
    page.get_by_role("button", name="Again", exact=True).click()
    finish(page, 2)

    assert page.locator(".card .caption").all_inner_texts() == ["to be kept"] * 2
    assert site.backend.requests[0].seed == site.backend.requests[1].seed


def test_copies_run_as_they_are(page: Any, site: Any, tmp_path: Path):
    slow(site, 0.001)
    ready(page)
    page.fill("#prompt", 'it\'s a "$cat" `ü`')
    page.select_option("#adapter", "pixels")
    page.select_option("#step-cache", "easycache")
    page.click("#run")
    finish(page)
    run_copies(page, tmp_path)
    until(page, "!document.querySelector('.actions').textContent.includes('copied')")

    first, by_curl, by_python = site.backend.requests
    assert shaping(by_curl) == shaping(first)
    assert shaping(by_python) == shaping(first)


def test_copies_of_edits_have_image_and_mask(page: Any, site: Any, tmp_path: Path):
    slow(site, 0.001)
    ready(page)
    page.fill("#prompt", "@home")  # curl's -F would read a file of that name
    page.select_option("#adapter", "ink")
    page.select_option("#step-cache", "easycache")
    upload(page)
    stroke(page)
    page.click("#run")
    finish(page)
    downloads: list[Any] = []
    page.on("download", lambda download: downloads.append(download))
    page.get_by_role("button", name="Download").click()
    while len(downloads) < 3:
        page.wait_for_timeout(40)
    for each in downloads:
        each.save_as(tmp_path / each.suggested_filename)
    run_copies(page, tmp_path)

    first, by_curl, by_python = site.backend.requests
    assert (first.prompt, first.task) == ("@home", Task.INPAINTING)
    for copy in (by_curl, by_python):
        assert shaping(copy) == shaping(first)
        assert copy.mask == first.mask


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
    page.click("#settings summary")
    upload(page)
    page.click(".card .frames button")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate(
        "e => { const v = document.getElementById('viewer'); "
        "return v.scrollWidth <= v.clientWidth; }"
    )


def test_the_keyboard_is_enough(page: Any, site: Any):
    ready(page)
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("typed")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in lines")
    page.keyboard.press("Enter")
    finish(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+Enter")
    finish(page, 2)
    page.get_by_role("button", name="Remove").last.press("Enter")
    finish(page)
    page.focus(".card .frames button")
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()

    assert [r.prompt for r in site.backend.requests] == ["typed\nin lines"] * 2
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


def test_a_key_is_never_copied(browser: Any, tmp_path: Path):
    keys = (ApiKey(name="me", sha256=hash_key("sk-mine")),)
    for site in serve(SteppingBackend(), keys):
        page = browser.new_context().new_page()
        page.goto(site.url)
        page.wait_for_selector("#key-field:not([hidden])")
        page.fill("#key", "sk-mine")
        page.press("#key", "Tab")
        ready(page)
        page.click("#run")
        finish(page)
        assert "sk-mine" not in run_copies(page, tmp_path, STEPSERVE_API_KEY="sk-mine")
        page.context.close()
        assert [request.owner for request in site.backend.requests] == ["me"] * 3


def test_a_model_that_loads_is_shown_and_waited_for(page: Any, site: Any):
    ready(page)
    [status] = site.backend.statuses
    site.backend.statuses = [ModelStatus(status.capabilities, ready=False, detail="warming up")]
    page.reload()
    until(page, "document.getElementById('status').textContent.includes('warming up')")
    page.click("#run")
    assert page.inner_text("#problem") == "The model is not ready yet."
    page.select_option("#scheduler", "ddim")
    site.backend.statuses = [status]
    ready(page)

    # What was chosen meanwhile stays.
    assert page.input_value("#scheduler") == "ddim"


def test_what_a_model_makes_nothing_of_is_not_asked_for(page: Any, site: Any):
    [status] = site.backend.statuses
    embedded = Guidance("guidance_scale", 1.0, False, False, StepWork(), StepWork())
    none = replace(embedded, argument="")
    steps = {"euler": StepRange(2, 2)}
    seen = ((CLASSIC, (True, True)), (embedded, (True, False)), (none, (False, False)))
    for guidance, shown in seen:
        told = replace(status.capabilities, guidance=guidance, scheduler_steps=steps)
        site.backend.statuses = [ModelStatus(told, ready=True)]
        page.reload()
        ready(page)
        assert (page.is_visible("#guidance"), page.is_visible("#negative")) == shown
    page.select_option("#scheduler", "euler")
    assert page.input_value("#steps") == "2"


def test_a_negative_prompt_needs_guidance(page: Any, site: Any):
    ready(page)
    page.fill("#negative", "a dog")
    page.fill("#guidance", "1")
    assert page.is_disabled("#negative")
    page.click("#run")
    finish(page)
    assert site.backend.requests[0].negative_prompt == ""


def test_sizes_are_few_and_any_other_can_be_typed(page: Any, site: Any):
    [status] = site.backend.statuses
    sizes = SizeRange(minimum=64, maximum=4096, step=8, native=1024)
    told = status.capabilities.__class__(**(vars(status.capabilities) | {"sizes": sizes}))
    site.backend.statuses = [ModelStatus(told, ready=True)]
    page.reload()
    ready(page)
    assert page.locator("#size option").count() < 20
    page.select_option("#size", "custom")
    page.fill("#width", "1160")
    page.fill("#height", "888")
    page.click("#run")
    finish(page)

    [request] = site.backend.requests
    assert (request.width, request.height) == (1160, 888)


def test_the_page_works_where_nothing_can_be_kept(browser: Any, site: Any):
    page = browser.new_context().new_page()
    page.add_init_script(
        """for (const name of ['localStorage', 'sessionStorage', 'indexedDB'])
        Object.defineProperty(window, name, {get() { throw new DOMException('no'); }});"""
    )
    page.goto(site.url)
    ready(page)
    page.click("#theme")
    page.click("#run")
    finish(page)
    page.context.close()

    assert len(site.backend.requests) == 1


def test_an_idle_page_in_the_background_asks_nothing(page: Any, site: Any):
    ready(page)
    page.click("#loom summary")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert [url for url in asked if url.endswith("/batch")] == []
    page.click("#loom summary")
    deadline_s = time.monotonic() + WAIT_S
    while not any(url.endswith("/batch") for url in asked):
        assert time.monotonic() < deadline_s
        page.wait_for_timeout(40)


def test_every_size_of_text_has_contrast(page: Any):
    """WCAG AA: 4.5 to 1, in both themes."""
    ready(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for pair in (
            ("--ink", "--paper"),
            ("--soft", "--paper"),
            ("--soft", "--sheet"),
            ("--bad", "--paper"),
            ("--bad", "--sheet"),
            ("--panel-soft", "--panel"),
        ):
            assert page.evaluate(CONTRAST, list(pair)) >= 4.5, (scheme, pair)


CONTRAST = """names => {
  const context = new OffscreenCanvas(1, 1).getContext('2d');
  const light = (name) => {
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = names.map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


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


def test_files_of_the_page_are_asked_for_again_by_etag(site: Any):
    first = httpx.get(f"{site.url}/playground/style.css")
    again = httpx.get(
        f"{site.url}/playground/style.css", headers={"If-None-Match": first.headers["ETag"]}
    )

    assert first.headers["Cache-Control"] == "no-cache"
    assert again.status_code == 304
    policy = httpx.get(site.url).headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
