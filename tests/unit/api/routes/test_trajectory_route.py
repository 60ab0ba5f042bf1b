"""`trajectory` in requests and responses: what it means, how it is sent, what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend, finish
from stepserve.domain.events import (
    Accepted,
    EncodedTrajectory,
    Event,
    Finished,
    Outcome,
    TrajectoryStep,
)
from stepserve.domain.requests import GenerationRequest, TrajectoryFormat, TrajectoryRequest

URL = "/v1/images/generations"
FILE = "application/vnd.safetensors"
SHOWN = EncodedTrajectory(
    "image/png",
    steps=(TrajectoryStep(1, 999.0, b"static", b"blur"), TrajectoryStep(2, 1.5, b"cat", b"")),
)
TENSORS = EncodedTrajectory(FILE, tensors=b"tensors")


def leaving(trajectory: EncodedTrajectory) -> Callable[[GenerationRequest], Any]:
    """A model that makes images with this trajectory."""

    async def generate(request: GenerationRequest) -> Outcome:
        finished = await finish(request)
        assert isinstance(finished, Finished)
        images = tuple(replace(image, trajectory=trajectory) for image in finished.images)
        return replace(finished, images=images)

    return generate


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({}, TrajectoryRequest(TrajectoryFormat.IMAGES, 1)),
        ("images", TrajectoryRequest(TrajectoryFormat.IMAGES, 1)),
        ("safetensors", TrajectoryRequest(TrajectoryFormat.SAFETENSORS, 1)),
        ({"every": 5}, TrajectoryRequest(TrajectoryFormat.IMAGES, 5)),
        (
            {"format": "safetensors", "every": 2.0},
            TrajectoryRequest(TrajectoryFormat.SAFETENSORS, 2),
        ),
        (None, None),
    ],
)
async def test_a_request_says_which_steps_it_wants(
    client: httpx.AsyncClient, backend: FakeBackend, sent: Any, wanted: TrajectoryRequest | None
):
    response = await client.post(URL, json={"prompt": "cat", "trajectory": sent})

    assert response.status_code == 200, response.text
    assert backend.requests[-1].trajectory == wanted


@pytest.mark.parametrize("form", [{"trajectory[format]": "safetensors"}, {"trajectory": None}])
async def test_forms_take_it_too(
    client: httpx.AsyncClient, backend: FakeBackend, form: dict[str, str | None]
):
    fields = {name: value or '{"format": "safetensors"}' for name, value in form.items()}
    parts = {"prompt": (None, "cat")} | {name: (None, text) for name, text in fields.items()}
    response = await client.post(URL, files=parts)

    assert response.status_code == 200, response.text
    assert backend.requests[-1].trajectory == TrajectoryRequest(TrajectoryFormat.SAFETENSORS)


async def test_images_of_steps_stand_beside_the_image(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.generate_with(leaving(SHOWN))
    response = await client.post(URL, json={"prompt": "cat", "trajectory": {}, "seed": 7})

    (image,) = response.json()["data"]
    assert base64.b64decode(image["b64_json"]) == b"seed 7"
    assert image["trajectory"] == {
        "format": "images",
        "steps": [
            {
                "step": 1,
                "timestep": 999.0,
                "x_t": {"b64_json": base64.b64encode(b"static").decode()},
                "x_0": {"b64_json": base64.b64encode(b"blur").decode()},
            },
            {
                "step": 2,
                "timestep": 1.5,
                "x_t": {"b64_json": base64.b64encode(b"cat").decode()},
            },
        ],
    }


async def test_tensors_are_links_where_images_are(client: httpx.AsyncClient, backend: FakeBackend):
    backend.generate_with(leaving(TENSORS))
    body = {"prompt": "cat", "trajectory": "safetensors", "response_format": "url"}
    (image,) = (await client.post(URL, json=body)).json()["data"]
    trajectory = image["trajectory"]
    fetched = await client.get(trajectory["file"]["url"])

    assert trajectory["format"] == "safetensors"
    assert fetched.content == b"tensors"
    assert fetched.headers["content-type"] == FILE
    assert ".safetensors" in fetched.headers["content-disposition"]


async def test_streams_have_it_with_the_finished_image(
    client: httpx.AsyncClient, backend: FakeBackend
):
    async def accept_and_finish(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Accepted(request.id, 0, 0.5)
        yield await leaving(TENSORS)(request)

    backend.stream_with = accept_and_finish
    body = {"prompt": "cat", "trajectory": "safetensors", "stream": True}
    response = await client.post(URL, json=body)

    (line,) = (line for line in response.text.splitlines() if line.startswith("data: "))
    file = json.loads(line.removeprefix("data: "))["trajectory"]["file"]
    assert base64.b64decode(file["b64_json"]) == b"tensors"


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"trajectory": {"every": 0}}, "trajectory.every", "must be 1 to 1000, got 0"),
        ({"trajectory": {"format": "video"}}, "trajectory.format", "video"),
        ({"return_latents": True}, "return_latents", "did you mean 'trajectory'?"),
        (
            {"trajectory": {}, "num_inference_steps": 60},
            "trajectory.every",
            "must be at least 2, got 1: images of at most 50 steps",
        ),
        ({"trajectory": {}, "prompts": ["a", "b"], "prompt": None}, "trajectory", "exclude"),
    ],
)
async def test_what_cannot_be_is_refused_by_field(
    client: httpx.AsyncClient, backend: FakeBackend, body: dict[str, Any], param: str, part: str
):
    response = await client.post(URL, json={"prompt": "cat"} | body)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert part in error["message"]
    assert not backend.requests


async def test_the_log_of_requests_keeps_no_trajectory(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.generate_with(leaving(TENSORS))
    await client.post(URL, json={"prompt": "cat", "trajectory": "safetensors"})

    events = backend.log.events_since(backend.requests[-1].key, 0)
    assert events is not None
    (finished,) = (e.event for e in events if isinstance(e.event, Finished))
    assert [image.trajectory for image in finished.images] == [None]
