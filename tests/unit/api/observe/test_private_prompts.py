"""What people ask for is not written to the log."""

from __future__ import annotations

import base64
import io
import logging

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend, client_for, raising
from PIL import Image
from stepserve.config import Settings
from stepserve.domain.errors import GenerationFailedError, ServerFullError
from stepserve.domain.model_status import ModelStatus
from usual_tasks import USUAL_TASKS

SECRET = "zebra crossing moonlight"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture
async def client(backend: FakeBackend) -> httpx.AsyncClient:
    tasks = USUAL_TASKS
    backend.statuses = [ModelStatus(EMOJI.__class__(**{**vars(EMOJI), "tasks": tasks}), ready=True)]
    return client_for(backend, Settings())


def drawn_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_no_prompt_is_logged(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    url = f"data:image/png;base64,{base64.b64encode(drawn_image()).decode()}"
    good = {"prompt": SECRET, "negative_prompt": SECRET}
    bodies = [
        good,
        good | {"stream": True, "partial_images": 1},
        good | {"response_format": "url"},
        {"prompts": [SECRET, SECRET * 100]},
        # Wrong in the prompt, beside it, and after the prompt was looked at.
        {"prompt": SECRET * 100},
        {"prompt": [SECRET]},
        good | {"n": -1},
        good | {SECRET: SECRET},
        good | {"scheduler": SECRET},
        good | {"model": SECRET},
    ]
    statuses = [(await client.post(GENERATIONS, json=body)).status_code for body in bodies]
    statuses.append((await client.post(GENERATIONS, content=SECRET)).status_code)
    edits = [
        await client.post(EDITS, data=good, files={"image": drawn_image()}),
        await client.post(EDITS, data=good, files={"image": SECRET.encode()}),
        await client.post(EDITS, json=good | {"image": url}),
        await client.post(EDITS, json=good | {"image": f"https://a.example/{SECRET}"}),
    ]
    statuses += [response.status_code for response in edits]
    for error in (GenerationFailedError("it broke"), ServerFullError("full", 1), KeyError("bug")):
        backend.generate_with(raising(error))
        statuses.append((await client.post(GENERATIONS, json=good)).status_code)

    assert {200, 400, 404, 415, 429, 500} <= set(statuses)
    assert backend.requests[0].prompt == SECRET
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    for word in SECRET.split():
        assert word not in caplog.text
