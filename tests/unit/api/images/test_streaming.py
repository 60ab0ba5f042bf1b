"""`stream: true`: OpenAI's events, and what a client sees when something goes wrong on the way."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend, raising, run_through
from stepserve.domain.errors import CancelledError, GenerationFailedError, ServerFullError
from stepserve.domain.events import Accepted, Event, Failed
from stepserve.domain.requests import GenerationRequest

URL = "/v1/images/generations"


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((lines["event"], json.loads(lines["data"])))
    return events


async def test_a_stream_holds_partial_images_and_then_the_finished_ones(
    client: httpx.AsyncClient, backend: FakeBackend
):
    body = {"prompt": "cat", "stream": True, "partial_images": 2, "n": 2, "seed": 5}
    response = await client.post(URL, json=body)

    events = parse(response.text)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert [name for name, _ in events] == [
        *["image_generation.partial_image"] * 4,
        *["image_generation.completed"] * 2,
    ]
    assert all(data["type"] == name for name, data in events)
    partial = events[1][1]
    assert base64.b64decode(partial["b64_json"]) == b"preview 0"
    assert (partial["partial_image_index"], partial["image_index"], partial["seed"]) == (0, 1, 6)
    completed = events[-1][1]
    assert base64.b64decode(completed["b64_json"]) == b"seed 6"
    assert completed["usage"]["total_tokens"] == 0
    assert completed["parameters"]["seed"] == 5
    assert backend.requests[0].previews == 2


async def test_partial_images_without_a_stream_are_not_made(
    client: httpx.AsyncClient, backend: FakeBackend
):
    await client.post(URL, json={"prompt": "cat", "partial_images": 2})

    assert backend.requests[0].previews == 0


async def test_a_refusal_has_a_status_of_its_own(client: httpx.AsyncClient, backend: FakeBackend):
    async def refuse(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Failed(request.id, ServerFullError("full", 3))

    backend.stream_with = refuse
    response = await client.post(URL, json={"prompt": "cat", "stream": True})

    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"


async def test_cancelling_from_elsewhere_is_told(client: httpx.AsyncClient, backend: FakeBackend):
    async def cancelled(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Accepted(request.id, 0, None)
        yield Failed(request.id, CancelledError("cancelled"))

    backend.stream_with = cancelled
    response = await client.post(URL, json={"prompt": "cat", "stream": True})

    [(name, data)] = parse(response.text)
    assert (name, data["error"]["code"]) == ("error", "request_cancelled")


@pytest.mark.parametrize("raises", [True, False])
async def test_an_error_on_the_way_is_an_event(
    client: httpx.AsyncClient, backend: FakeBackend, raises: bool
):
    async def fail(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Accepted(request.id, 0, None)
        if raises:
            raise GenerationFailedError("boom")
        yield Failed(request.id, GenerationFailedError("boom"))

    backend.stream_with = fail
    response = await client.post(URL, json={"prompt": "cat", "stream": True})

    [(name, data)] = parse(response.text)
    assert (response.status_code, name, data["type"]) == (200, "error", "error")
    assert data["error"]["code"] == "generation_failed"
    assert "boom" not in response.text


async def test_mistakes_are_answered_before_a_stream_begins(client: httpx.AsyncClient):
    response = await client.post(URL, json={"prompt": "cat", "stream": True, "n": 99})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


async def test_backends_that_raise_at_once_are_answered(
    client: httpx.AsyncClient, backend: FakeBackend
):
    async def refuse(request: GenerationRequest) -> AsyncIterator[Event]:
        yield await raising(ServerFullError("full", 1))(request)

    backend.stream_with = refuse
    response = await client.post(URL, json={"prompt": "cat", "stream": True})

    assert response.status_code == 429


def test_a_client_that_leaves_ends_its_request(server_port: int, backend: FakeBackend):
    closed = asyncio.Event()

    async def endless(request: GenerationRequest) -> AsyncIterator[Event]:
        try:
            yield Accepted(request.id, 0, None)
            async for event in run_through(request):
                yield event
                await asyncio.Event().wait()
        finally:
            closed.set()

    backend.stream_with = endless
    body = {"prompt": "cat", "stream": True}
    url = f"http://127.0.0.1:{server_port}{URL}"
    with httpx.stream("POST", url, json=body, headers={"X-Request-ID": "leaver"}) as response:
        assert response.status_code == 200

    # Asked through the server, whose loop it is.
    for _ in range(200):
        state = httpx.get(f"http://127.0.0.1:{server_port}/v1/requests/leaver").json()["state"]
        if state == "cancelled":
            break
    assert state == "cancelled"
    assert closed.is_set()
