"""The playground shows a slot for each role that the chosen model has, and sends what is in it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_steps import finish, ready, run_copies, shaping, slow, stroke, transfer, until
from PIL import Image
from stepping_site import Site
from stepserve.domain.errors import ServerFullError
from stepserve.domain.events import Failed
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import ClassLabels, Control, ControlKind
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import ONE, OPTIONAL, Count, Role, Task, TaskInputs
from stepserve.pipelines.requests.inputs import decode_inputs
from usual_tasks import USUAL_TASKS

SLOTS = ("prompt", "class-field", "start-from", "controls", "references", "hires")
"""Elements of the page that a model has or has not."""

UNCONDITIONAL: Mapping[Task, TaskInputs] = {Task.UNCONDITIONAL: {}}
CLASSES: Mapping[Task, TaskInputs] = {Task.CLASS_TO_IMAGE: {Role.CLASS_LABEL: ONE}}
EDIT: Mapping[Task, TaskInputs] = {
    Task.EDIT: {Role.PROMPT: ONE, Role.IMAGE: Count(1, 3), Role.IMAGE_GUIDANCE: OPTIONAL}
}
MASKED_EDIT: Mapping[Task, TaskInputs] = {Task.EDIT: {**EDIT[Task.EDIT], Role.MASK: OPTIONAL}}
STEERED: Mapping[Task, TaskInputs] = {
    **USUAL_TASKS,
    Task.TEXT_TO_IMAGE: {
        Role.PROMPT: ONE,
        Role.CONTROL: Count(0, 2),
        Role.REFERENCE: Count(0, 2),
        Role.HIRES: OPTIONAL,
    },
}
UPSCALING: Mapping[Task, TaskInputs] = {
    Task.UPSCALING: {Role.PROMPT: OPTIONAL, Role.IMAGE: ONE, Role.NOISE_LEVEL: OPTIONAL}
}


def serve_only(page: Any, site: Site, tasks: Mapping[Task, TaskInputs], **told: Any) -> None:
    """From now on there is one model, which does these tasks."""
    [status, *_] = site.backend.statuses
    model = replace(status.capabilities, tasks=tasks, **told)
    site.backend.statuses = [ModelStatus(model, ready=True)]
    site.backend.step_s = 0.001
    page.reload()
    ready(page)


def png(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return {"name": f"{colour}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def choose(page: Any, place: str, *colours: str) -> None:
    """Choose images of single colours for a slot."""
    entries = page.locator(f"#{place} .entry")
    wanted = entries.count() + len(colours)
    page.set_input_files(f"#{place} .drop input", [png(colour) for colour in colours])
    until(
        page,
        "([place, n]) => document.querySelectorAll(`#${place} .entry`).length === n",
        [place, wanted],
    )


def colours(request: GenerationRequest) -> list[object]:
    """Of the images that a request begins with."""
    return [image.getpixel((32, 32)) for image in decode_inputs(request).images]


def shown(page: Any) -> set[str]:
    return {slot for slot in SLOTS if page.is_visible(f"#{slot}")}


@pytest.mark.parametrize(
    ("tasks", "slots"),
    [
        (UNCONDITIONAL, set[str]()),
        (CLASSES, {"class-field"}),
        (EDIT, {"prompt", "start-from"}),
        (STEERED, {"prompt", "start-from", "controls", "references", "hires"}),
        (UPSCALING, {"prompt", "start-from"}),
    ],
)
def test_a_model_has_the_slots_of_its_roles(
    page: Any, site: Site, tasks: Mapping[Task, TaskInputs], slots: set[str]
):
    serve_only(page, site, tasks)

    assert shown(page) == slots
    assert page.is_visible("#demo") == (not {Task.EDIT, Task.UPSCALING} & set(tasks))
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea')]
        .filter(e => !e.labels.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_an_unconditional_model_is_asked_for_an_image(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, UNCONDITIONAL)
    page.click("#run")
    finish(page)
    assert page.inner_text(".caption") == "emoji, unconditional"
    run_copies(page, tmp_path)

    requests = site.backend.requests
    assert [request.task for request in requests] == [Task.UNCONDITIONAL] * 3
    assert [shaping(request) for request in requests] == [shaping(requests[0])] * 3


def test_six_mixed_requests_need_no_prompt(page: Any, site: Site):
    serve_only(page, site, UNCONDITIONAL)
    page.click("#demo")
    finish(page, 6)

    assert {request.task for request in site.backend.requests} == {Task.UNCONDITIONAL}


def test_a_class_is_asked_for_by_number(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, CLASSES, classes=ClassLabels(10))
    page.fill("#class-number", "")
    page.click("#run")
    assert page.inner_text("#problem") == "Say which class to draw."
    page.fill("#class-number", "7")
    page.press("#class-number", "Control+Enter")
    finish(page)
    assert page.inner_text(".caption") == "class 7"
    run_copies(page, tmp_path)

    assert [request.class_label for request in site.backend.requests] == [7] * 3


def test_a_class_is_chosen_by_name(page: Any, site: Site):
    names = {0: ("cat", "kitten"), 2: ("dog",)}
    serve_only(page, site, CLASSES, classes=ClassLabels(3, names))
    assert not page.is_visible("#class-number")
    page.select_option("#class-name", label="2 · dog")
    page.click("#run")
    finish(page)
    assert page.inner_text(".caption") == "dog"
    page.click("#demo")
    finish(page, 7)

    first, *others = (request.class_label for request in site.backend.requests)
    assert first == 2
    assert set(others) <= {0, 1, 2}


def test_reference_images_have_a_scale_and_an_adapter_each(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, STEERED, ip_adapters=("style", "face"))
    choose(page, "references", "red", "blue")
    first = page.locator("#references .entry").first
    first.locator("[name=scale]").fill("0.9")
    first.locator("[name=adapter]").select_option("face")
    page.click("#run")
    finish(page)
    save_downloads(page, tmp_path, 3)
    run_copies(page, tmp_path)
    page.click(".card .frames button")
    assert "face \N{MULTIPLICATION SIGN} 0.9, style \N{MULTIPLICATION SIGN} 0.6" in page.inner_text(
        "#viewer dl"
    )

    requests = site.backend.requests
    uses = [(use.adapter, use.scale) for use in requests[0].references]
    assert uses == [("face", 0.9), ("style", 0.6)]
    assert [request.references for request in requests] == [requests[0].references] * 3
    assert [shaping(request) for request in requests] == [shaping(requests[0])] * 3


CONTROLS = (
    Control("canny", ControlKind.CONTROLNET, preprocessor="canny"),
    Control("lines", ControlKind.T2I_ADAPTER, takes_interval=False),
)


def test_control_images_have_what_their_control_takes(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, STEERED, controls=CONTROLS)
    choose(page, "controls", "red", "blue")
    assert not page.is_visible("#controls .drop")
    first, second = page.locator("#controls .entry").all()
    assert "as usual: edges" in first.locator("[name=preprocessor]").inner_text()
    second.locator("[name=name]").select_option("lines")
    assert not second.locator("[name=end]").is_visible()
    second.locator("[name=preprocessor]").select_option("invert")
    first.locator("[name=scale]").fill("0.5")
    first.locator("[name=end]").fill("0.75")
    page.click("#run")
    finish(page)
    save_downloads(page, tmp_path, 3)
    run_copies(page, tmp_path)
    page.click(".card .frames button")
    assert "0 to 0.75" in page.inner_text("#viewer dl")

    asked = [request.controls for request in site.backend.requests]
    assert [(use.name, use.scale, use.end) for use in asked[0]] == [
        ("canny", 0.5, 0.75),
        ("lines", 1.0, 1.0),
    ]
    assert asked[0][1].preprocessor == "invert"
    assert asked == [asked[0]] * 3


def test_an_image_is_enlarged_and_refined(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, STEERED)
    assert page.is_disabled("#hires [name=scale]")
    page.check("#enlarge")
    page.fill("#hires [name=scale]", "1.5")
    page.fill("#hires [name=strength]", "0.25")
    page.click("#run")
    finish(page)
    run_copies(page, tmp_path)

    asked = [request.hires for request in site.backend.requests]
    assert asked[0] is not None
    # Steps that were left empty are those of the image.
    told = (asked[0].scale, asked[0].strength, asked[0].num_inference_steps)
    assert told == (1.5, 0.25, 20)
    assert asked == [asked[0]] * 3


def test_an_image_is_upscaled(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, UPSCALING, upscale_factor=2, max_noise_level=350)
    assert not page.is_visible("#size")
    page.set_input_files("#file", [png("red")])
    page.wait_for_selector("#editor:not([hidden])")
    assert not page.is_visible("#paint")
    page.fill("#noise-level", "30")
    page.click("#run")
    finish(page)
    save_downloads(page, tmp_path, 2)
    assert "httpx.post" in run_copies(page, tmp_path)

    requests = site.backend.requests
    assert [(r.task, r.noise_level, r.width) for r in requests] == [(Task.UPSCALING, 30, 128)] * 3
    assert [shaping(request) for request in requests] == [shaping(requests[0])] * 3


def test_what_a_task_does_not_take_is_said_before_anything_is_sent(page: Any, site: Site):
    serve_only(page, site, STEERED, ip_adapters=("style",))
    choose(page, "references", "red")
    page.set_input_files("#file", [png("blue")])
    page.wait_for_selector("#editor:not([hidden])")
    page.click("#run")
    assert page.inner_text("#problem") == ("Remove the image: text-to-image with emoji takes none.")
    page.click("#no-input")
    page.click("#run")
    finish(page)

    assert not site.backend.requests[0].images


def test_three_images_are_put_in_order_by_keyboard(page: Any, site: Site, tmp_path: Path):
    serve_only(page, site, EDIT)
    page.fill("#prompt", "the red one on the blue one")
    page.click("#run")
    assert page.inner_text("#problem") == "Add the image."
    choose(page, "start-from", "red", "lime", "blue")
    assert not page.is_visible("#drop")
    page.get_by_role("button", name="Move image 3 earlier").press("Enter")
    # The keyboard stays with the image, so that it can be moved on.
    assert page.evaluate("document.activeElement.ariaLabel") == "Move image 2 earlier"
    page.keyboard.press("Enter")
    page.fill("#image-guidance", "1.5")
    page.click("#run")
    finish(page)
    save_downloads(page, tmp_path, 4)
    run_copies(page, tmp_path)

    first, by_curl, by_python = site.backend.requests
    assert (first.task, first.strength, first.image_guidance_scale) == (Task.EDIT, None, 1.5)
    assert colours(first) == [(0, 0, 255), (255, 0, 0), (0, 255, 0)]
    for copy in (by_curl, by_python):
        assert (copy.images, copy.image_guidance_scale) == (first.images, 1.5)
        assert shaping(copy) == shaping(first)


def save_downloads(page: Any, folder: Path, count: int) -> None:
    """Save what a card downloads: its images, and the files that it began with."""
    downloads: list[Any] = []
    page.on("download", lambda download: downloads.append(download))
    page.get_by_role("button", name="Download").click()
    while len(downloads) < count:
        page.wait_for_timeout(40)
    for each in downloads:
        each.save_as(folder / each.suggested_filename)


def test_an_image_is_removed_and_another_one_takes_its_place(page: Any, site: Site):
    serve_only(page, site, EDIT)
    choose(page, "start-from", "red", "lime", "blue")
    page.get_by_role("button", name="Remove image 1").press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove image 1"
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer(page, "a.png", "image/png")})
    until(page, "document.querySelectorAll('#start-from .entry').length === 3")
    page.click("#run")
    finish(page)

    assert colours(site.backend.requests[0])[:2] == [(0, 255, 0), (0, 0, 255)]


def test_a_mask_belongs_to_the_first_image(page: Any, site: Site):
    serve_only(page, site, MASKED_EDIT)
    choose(page, "start-from", "red", "blue")
    stroke(page)
    page.click("#run")
    finish(page)
    # Of another first image nothing is painted.
    page.get_by_role("button", name="Move image 2 earlier").click()
    until(page, "document.getElementById('mask-hint').textContent.startsWith('Nothing')")
    page.click("#run")
    finish(page, 2)

    masked, plain = site.backend.requests
    assert masked.mask is not None
    assert plain.mask is None
    assert colours(masked) == colours(plain)[::-1]


def test_images_beyond_what_a_model_takes_are_kept_and_not_sent(page: Any, site: Site):
    serve_only(page, site, EDIT)
    one = {Task.EDIT: {Role.PROMPT: ONE, Role.IMAGE: ONE}}
    [edits] = site.backend.statuses
    plain = replace(edits.capabilities, id="plain", tasks={Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE}})
    single = replace(edits.capabilities, id="single", tasks=one)
    site.backend.statuses += [ModelStatus(plain, ready=True), ModelStatus(single, ready=True)]
    page.reload()
    ready(page)
    choose(page, "start-from", "red", "lime", "blue")
    for count, model in enumerate(("single", "plain", "emoji"), start=1):
        page.select_option("#model", model)
        page.click("#run")
        finish(page, count)

    assert [len(request.images) for request in site.backend.requests] == [1, 0, 3]


def test_without_a_prompt_an_image_is_varied(page: Any, site: Site, tmp_path: Path):
    slow(site, 0.001)
    ready(page)
    page.fill("#prompt", "")
    page.set_input_files("#file", [png("red")])
    page.wait_for_selector("#editor:not([hidden])")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.click("#run")
    finish(page)
    save_downloads(page, tmp_path, 2)
    run_copies(page, tmp_path)

    assert any(url.endswith("/v1/images/variations") for url in asked)
    first, by_curl, by_python = site.backend.requests
    assert (first.task, first.prompt, first.strength) == (Task.IMAGE_TO_IMAGE, "", 0.8)
    assert shaping(by_curl) == shaping(by_python) == shaping(first)


def test_several_prompts_are_made_side_by_side(page: Any, site: Site, tmp_path: Path):
    slow(site, 0.001)
    ready(page)
    page.check("#lines")
    page.fill("#prompt", "a cat\n\n a dog")
    page.press("#prompt", "Enter")
    page.keyboard.type("a fox")
    page.fill("#count", "2")
    page.press("#prompt", "Control+Enter")
    finish(page)
    assert page.inner_text(".caption") == "a cat and 2 more"
    assert page.locator(".frames img").count() == 6
    page.locator(".frames button").nth(3).click()
    assert page.inner_text("#viewer-title") == "a dog"
    page.keyboard.press("Escape")
    run_copies(page, tmp_path)

    prompts = [request.prompt for request in site.backend.requests]
    assert [sorted(prompts[i : i + 3]) for i in (0, 3, 6)] == [["a cat", "a dog", "a fox"]] * 3
    assert (tmp_path / "image-5.png").read_bytes()


def test_of_several_prompts_each_fails_by_itself(page: Any, site: Site):
    usual = site.backend.stream_with

    async def fail_dogs(request: GenerationRequest) -> Any:
        if request.prompt == "a dog":
            yield Failed(request.id, ServerFullError("no room for dogs", 1))
            return
        async for event in usual(request):
            yield event

    site.backend.stream_with = fail_dogs
    ready(page)
    page.check("#lines")
    page.fill("#prompt", "a dog\na cat")
    page.click("#run")
    finish(page)

    assert "1 of 2 failed: no room for dogs" in page.inner_text(".news")
    assert page.locator(".frames button:disabled").count() == 1
    page.reload()
    finish(page)
    assert page.get_attribute(".frames button:not(:disabled) img", "alt") == "a cat, image 2"


def test_what_an_older_page_kept_is_made_again(page: Any, site: Site):
    ready(page)
    page.evaluate(KEEP_AS_BEFORE)
    page.reload()
    ready(page)
    finish(page)
    page.get_by_role("button", name="Again", exact=True).click()
    finish(page, 2)

    [request] = site.backend.requests
    assert (request.task, request.prompt, request.strength) == (Task.IMAGE_TO_IMAGE, "old", 0.5)
    assert page.locator(".caption").all_inner_texts() == ["old"] * 2


# Before there were other inputs than an image and a mask.
KEEP_AS_BEFORE = """async () => {
  const canvas = new OffscreenCanvas(64, 64);
  canvas.getContext('2d').fillRect(0, 0, 64, 64);
  const image = await canvas.convertToBlob();
  const body = {prompt: 'old', model: 'emoji', size: '64x64', n: 1, num_inference_steps: 4,
    guidance_scale: 1, scheduler: 'euler', seed: 3, strength: 0.5};
  await new Promise((resolve) => {
    const asked = indexedDB.open('stepserve', 1);
    asked.onsuccess = () => {
      const transaction = asked.result.transaction('made', 'readwrite');
      transaction.objectStore('made').put({id: 'old', body, files: {image, mask: null},
        images: ['data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='], made: 1, hue: 75});
      transaction.oncomplete = () => { asked.result.close(); resolve(); };
    };
  });
}"""
