"""`hires` of `POST /v1/images/generations`: what it means, what is told of it, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend
from stepserve.domain.requests import Hires
from stepserve.domain.tasks import ONE, Role, Task

URL = "/v1/images/generations"


async def draw(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(URL, json={"prompt": "cat", **body})


def refusal(response: httpx.Response) -> tuple[str, str]:
    error = response.json()["error"]
    assert response.status_code == 400, error
    return error["param"], error["message"]


async def test_what_is_left_out_is_filled_in(client: httpx.AsyncClient, backend: FakeBackend):
    response = await draw(client, size="64x48", num_inference_steps=12, seed=1, hires={})
    told = response.json()

    assert response.status_code == 200, told
    (request,) = backend.requests
    assert request.hires == Hires(2.0, 0.5, 12, 128, 96)
    assert (told["size"], told["parameters"]["size"]) == ("128x96", "64x48")
    sent = {"scale": 2.0, "strength": 0.5, "num_inference_steps": 12}
    assert told["parameters"]["hires"] == sent


async def test_the_parameters_of_a_response_make_the_same_request(
    client: httpx.AsyncClient, backend: FakeBackend
):
    hires = {"scale": 1.3, "strength": 0.25, "num_inference_steps": 8}
    told = (await draw(client, hires=hires, seed=3)).json()
    parameters = {name: value for name, value in told["parameters"].items() if value is not None}
    again = await client.post(URL, json=parameters)

    assert again.status_code == 200, again.text
    first, second = backend.requests
    assert replace(first, id="") == replace(second, id="")
    # To the nearest side that the model takes.
    assert first.final_size == told["size"] == again.json()["size"] == "80x80"
    assert "ignored_fields" not in again.json()


async def test_forms_hold_it_as_json(client: httpx.AsyncClient, backend: FakeBackend):
    form = {"prompt": (None, "cat"), "hires": (None, json.dumps({"scale": 1.5}))}
    response = await client.post(URL, files=form)

    assert response.status_code == 200, response.text
    assert backend.requests[0].final_size == "96x96"


@pytest.mark.parametrize(
    ("hires", "param", "message"),
    [
        ({"scale": 3}, "hires.scale", "hires.scale 3 makes 192x192 of size 64x64, and each side"),
        ({"scale": 1}, "hires.scale", "hires.scale must be over 1 and at most 4, got 1"),
        ({"scale": 1e300}, "hires.scale", "hires.scale must be over 1 and at most 4, got 1e+300"),
        ({"strength": 0}, "hires.strength", "hires.strength must be over 0 and at most 1, got 0"),
        ({"num_inference_steps": 0}, "hires.num_inference_steps", "must be 1 to"),
        ({"scale": "2"}, "hires.scale", "hires.scale"),
        ({"skale": 2}, "hires.skale", "did you mean 'scale'?"),
        (2, "hires", "hires"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, hires: Any, param: str, message: str
):
    named, told = refusal(await draw(client, hires=hires))

    assert named == param
    assert message in told


async def test_a_model_that_refines_nothing_says_what_it_takes(
    client: httpx.AsyncClient, backend: FakeBackend
):
    (status,) = backend.statuses
    limits = replace(status.capabilities, tasks={Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE}})
    backend.statuses = [replace(status, capabilities=limits)]
    param, message = refusal(await draw(client, hires={}))

    assert param == "hires"
    assert "text-to-image with model 'emoji' does not take one (it takes: prompt)" in message


@pytest.mark.parametrize(
    ("url", "field", "message"),
    [
        ("/v1/images/variations", "hires", "/v1/images/generations takes it"),
        (URL, "enable_hr", "did you mean 'hires'?"),
    ],
)
async def test_it_is_not_passed_over(client: httpx.AsyncClient, url: str, field: str, message: str):
    body = {"prompt": "cat", "image": "data:image/png;base64,AAAA", field: {}}
    if url == URL:
        del body["image"]
    _, told = refusal(await client.post(url, json=body))

    assert message in told
