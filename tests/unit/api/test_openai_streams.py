"""The official clients, Python (sync and async) and JavaScript, over everything that they know."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from api_fakes import EMOJI, FakeBackend
from PIL import Image

from service.api import ModelStatus
from service.domain.requests import Task

PACKAGE = "openai@6"
INSTALL_S = 120


def picture(mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def url(server_port: int, backend: FakeBackend) -> str:
    tasks = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINTING)
    capabilities = EMOJI.__class__(**{**vars(EMOJI), "tasks": tasks})
    backend.statuses = [ModelStatus(capabilities, ready=True)]
    return f"http://127.0.0.1:{server_port}/v1"


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=10) as client:
        yield client


def test_generation_is_streamed(ai: openai.OpenAI):
    with ai.images.generate(prompt="cat", stream=True, partial_images=2) as events:
        told = list(events)

    assert [event.type for event in told] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert told[0].type == "image_generation.partial_image"
    assert base64.b64decode(told[0].b64_json) == b"preview 0"
    assert told[0].partial_image_index == 0
    assert told[2].type == "image_generation.completed"
    assert told[2].usage.total_tokens == 0
    assert told[2].output_format == "png"


def test_edits_whole_and_streamed(ai: openai.OpenAI, backend: FakeBackend):
    image, mask = ("a.png", picture()), ("m.png", picture("RGBA"))
    whole = ai.images.edit(image=image, mask=mask, prompt="blue", n=2, quality="high")
    with ai.images.edit(image=[image], prompt="blue", stream=True, partial_images=1) as events:
        told = [event.type for event in events]

    assert len(whole.data or []) == 2
    assert told == ["image_edit.partial_image", "image_edit.completed"]
    assert [r.task for r in backend.requests] == [Task.INPAINTING, Task.IMAGE_TO_IMAGE]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_as_links(ai: openai.OpenAI):
    answer = ai.images.create_variation(image=("a.png", picture()), response_format="url")

    assert answer.data is not None
    assert "/v1/results/" in (answer.data[0].url or "")


async def test_async_client(url: str):
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as ai:
        answer = await ai.images.generate(prompt="cat", response_format="b64_json")
        stream = await ai.images.generate(prompt="cat", stream=True)
        told = [event.type async for event in stream]

    assert answer.data is not None
    assert told == ["image_generation.completed"]


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which OpenAI's npm package is installed."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("javascript")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", PACKAGE]
    installed = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE}: {installed.stderr.strip()[:200]}")
    return folder


SCRIPT = """
import OpenAI, { toFile } from "openai";
const ai = new OpenAI({ baseURL: process.env.URL, apiKey: "unused", maxRetries: 0 });
const bytes = Buffer.from(process.env.PICTURE, "base64");
const file = () => toFile(bytes, "a.png", { type: "image/png" });
const told = {};
const answer = await ai.images.generate({ prompt: "cat", n: 2, seed: 5 });
told.generated = answer.data.map((image) => atob(image.b64_json));
told.streamed = [];
const stream = await ai.images.generate({ prompt: "cat", stream: true, partial_images: 2 });
for await (const event of stream) told.streamed.push(event.type);
const edited = await ai.images.edit({ image: await file(), mask: await file(), prompt: "blue" });
told.edited = edited.data.length;
told.editStreamed = [];
const edits = await ai.images.edit({ image: await file(), prompt: "blue", stream: true });
for await (const event of edits) told.editStreamed.push(event.type);
const varied = await ai.images.createVariation({ image: await file(), response_format: "url" });
told.varied = varied.data[0].url.includes("/v1/results/");
told.models = (await ai.models.list()).data.map((model) => model.id);
try {
  await ai.images.generate({ prompt: "cat", n: 99 });
} catch (error) {
  told.refused = [error.status, error.code, error.param];
}
console.log(JSON.stringify(told));
"""


def test_javascript_client(javascript: Path, url: str):
    script = javascript / "script.mjs"
    script.write_text(SCRIPT)
    environment = {"URL": url, "PICTURE": base64.b64encode(picture("RGBA")).decode()}
    ran = subprocess.run(
        ["node", str(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "generated": ["seed 5", "seed 6"],
        "streamed": [*["image_generation.partial_image"] * 2, "image_generation.completed"],
        "edited": 1,
        "editStreamed": ["image_edit.completed"],
        "varied": True,
        "models": ["emoji"],
        "refused": [400, "invalid_value", "n"],
    }
