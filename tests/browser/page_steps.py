"""What people do on the playground, as steps of its tests."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

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
        "n => document.querySelectorAll('.card [aria-label=Download]').length === n",
        arg=cards,
    )


def slow(site: Any, step_s: float) -> None:
    site.backend.step_s = step_s


def upload(page: Any, size: tuple[int, int] = (64, 64)) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "green").save(buffer, "PNG")
    page.set_input_files(
        "#file", {"name": "a.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    )
    page.wait_for_selector("#editor:not([hidden])")


def stroke(page: Any) -> None:
    """Drag from left to right over the middle of the image."""
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 1, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, middle, steps=8)
    page.mouse.up()


def transfer(page: Any, name: str, kind: str) -> Any:
    """A dragged or copied file, as the browser hands it over."""
    return page.evaluate_handle(
        """async ([name, kind]) => {
        const canvas = new OffscreenCanvas(64, 64);
        canvas.getContext('2d').fillRect(0, 0, 64, 64);
        const blob = kind === 'image/png' ? await canvas.convertToBlob() : new Blob(['no image']);
        const held = new DataTransfer();
        held.items.add(new File([blob], name, {type: kind}));
        return held; }""",
        [name, kind],
    )


def copied(page: Any, name: str) -> str:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.clipboard.writeText('')")
    page.get_by_role("button", name=f"Copy as {name}").click()
    until(page, "document.querySelector('.actions').textContent.includes('copied')")
    until(page, "navigator.clipboard.readText()")
    return page.evaluate("navigator.clipboard.readText()")


def run_copies(page: Any, folder: Path, **environment: str) -> str:
    """Run what the card copies, as a shell and Python do: they must succeed and write files."""
    env = os.environ | environment
    curl, python = copied(page, "curl"), copied(page, "Python")
    subprocess.run(["bash", "-ec", curl], cwd=folder, env=env, check=True, timeout=60)
    assert json.loads((folder / "answer.json").read_text())["data"]
    subprocess.run([sys.executable, "-c", python], cwd=folder, env=env, check=True, timeout=60)
    assert (folder / "image-0.png").read_bytes()
    return curl + python


def shaping(request: Any) -> tuple[object, ...]:
    """What of a request shapes its images."""
    names = ("prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler", "width")
    return (
        *(getattr(request, name) for name in names),
        request.adapters,
        request.strength,
        request.step_cache,
    )
