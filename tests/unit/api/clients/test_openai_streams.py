"""The official clients, Python (sync and async) and JavaScript, over everything that they know."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from api_fakes import EMOJI, FakeBackend
from running_clients import drawn_image, run_javascript
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.tasks import Task
from usual_tasks import USUAL_TASKS


@pytest.fixture
def url(server_port: int, backend: FakeBackend) -> str:
    tasks = USUAL_TASKS
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
    image, mask = ("a.png", drawn_image("RGB")), ("m.png", drawn_image())
    whole = ai.images.edit(image=image, mask=mask, prompt="blue", n=2, quality="high")
    with ai.images.edit(image=[image], prompt="blue", stream=True, partial_images=1) as events:
        told = [event.type for event in events]

    assert len(whole.data or []) == 2
    assert told == ["image_edit.partial_image", "image_edit.completed"]
    assert [r.task for r in backend.requests] == [Task.INPAINTING, Task.IMAGE_TO_IMAGE]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_as_links(ai: openai.OpenAI):
    response = ai.images.create_variation(image=("a.png", drawn_image()), response_format="url")

    assert response.data is not None
    assert "/v1/results/" in (response.data[0].url or "")


async def test_async_client(url: str):
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as ai:
        response = await ai.images.generate(prompt="cat", response_format="b64_json")
        stream = await ai.images.generate(prompt="cat", stream=True)
        told = [event.type async for event in stream]

    assert response.data is not None
    assert told == ["image_generation.completed"]


def test_javascript_client(javascript: Path, url: str):
    assert run_javascript("openai_images.mjs", javascript, url) == {
        "generated": ["seed 5", "seed 6"],
        "streamed": [*["image_generation.partial_image"] * 2, "image_generation.completed"],
        "edited": 1,
        "editStreamed": ["image_edit.completed"],
        "varied": True,
        "models": ["emoji"],
        "refused": [400, "invalid_value", "n"],
    }
