from __future__ import annotations

import base64
import time
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, FINGERPRINT, TIMINGS, FakeBackend
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import AdapterUse, GenerationRequest, OutputFormat, Priority

URL = "/v1/images/generations"


async def test_defaults_come_from_the_model(client: httpx.AsyncClient, backend: FakeBackend):
    response = await client.post(URL, json={"prompt": "cat"})

    assert response.status_code == 200
    request = backend.requests[0]
    assert (request.model, request.prompt, request.n) == ("emoji", "cat", 1)
    assert (request.width, request.height) == (64, 64)
    assert request.num_inference_steps == EMOJI.default_num_inference_steps
    assert request.guidance_scale == EMOJI.default_guidance_scale
    assert request.scheduler == "euler"
    assert request.output_format is OutputFormat.PNG
    assert 0 <= request.seed < 2**32


async def test_every_field_reaches_the_backend(client: httpx.AsyncClient, backend: FakeBackend):
    body = {
        "prompt": "cat",
        "model": "emoji",
        "n": 2,
        "size": "48x128",
        "response_format": "b64_json",
        "output_format": "webp",
        "user": "someone",
        "negative_prompt": "dog",
        "num_inference_steps": 7,
        "guidance_scale": 3,
        "seed": 5,
        "scheduler": "ddim",
        "guidance_start": 0.25,
        "guidance_end": 0.75,
        "priority": "batch",
        "deadline_s": 30,
        "reproducible": True,
    }
    response = await client.post(URL, json=body)

    assert response.status_code == 200
    assert backend.requests == [
        GenerationRequest(
            id=response.json()["id"],
            model="emoji",
            prompt="cat",
            width=48,
            height=128,
            num_inference_steps=7,
            guidance_scale=3.0,
            seed=5,
            scheduler="ddim",
            negative_prompt="dog",
            n=2,
            output_format=OutputFormat.WEBP,
            guidance_start=0.25,
            guidance_end=0.75,
            priority=Priority.BATCH,
            deadline_s=30.0,
            reproducible=True,
        )
    ]


async def test_the_answer(client: httpx.AsyncClient):
    before = int(time.time())
    response = await client.post(URL, json={"prompt": "cat", "n": 2, "seed": 5})
    answer = response.json()

    assert before <= answer["created"] <= time.time()
    assert answer["data"] == [
        {"b64_json": base64.b64encode(b"seed 5").decode(), "seed": 5},
        {"b64_json": base64.b64encode(b"seed 6").decode(), "seed": 6},
    ]
    assert (answer["model"], answer["seed"], answer["size"]) == ("emoji", 5, "64x64")
    assert answer["output_format"] == "png"
    assert answer["timings"] == asdict(TIMINGS)
    assert answer["fingerprint"] == FINGERPRINT.short
    assert response.headers["server-timing"] == TIMINGS.server_timing()


async def test_parameters_sent_back_make_the_same_request(
    client: httpx.AsyncClient, backend: FakeBackend
):
    body = {"prompt": "cat", "n": 2, "size": "64x80", "guidance_end": 0.5, "reproducible": True}
    first = await client.post(URL, json=body)
    again = await client.post(URL, json=first.json()["parameters"])

    assert again.json()["parameters"] == first.json()["parameters"]
    one, two = backend.requests
    assert replace(two, id=one.id) == one


async def test_adapters_are_passed_on_and_told(client: httpx.AsyncClient, backend: FakeBackend):
    wanted = [{"name": "pixels", "scale": 0.5}, {"name": "ink"}]
    response = await client.post(URL, json={"prompt": "cat", "adapters": wanted})

    assert backend.requests[0].adapters == (AdapterUse("pixels", 0.5), AdapterUse("ink", 1.0))
    told = response.json()["parameters"]["adapters"]
    assert told == [{"name": "pixels", "scale": 0.5}, {"name": "ink", "scale": 1.0}]
    again = await client.post(URL, json=response.json()["parameters"])
    assert again.json()["parameters"]["adapters"] == told


async def test_a_name_that_the_list_lacks_is_left_to_the_replica(
    client: httpx.AsyncClient, backend: FakeBackend
):
    """A file may have been added since the list was made."""
    await client.post(URL, json={"prompt": "cat", "adapters": [{"name": "new"}]})

    assert backend.requests[0].adapters == (AdapterUse("new"),)


@pytest.mark.parametrize(
    ("adapters", "param", "message"),
    [
        ("pixels", "adapters", 'such as [{"name": "ink", "scale": 0.8}], got'),
        (["pixels"], "adapters[0]", "adapters[0] must be"),
        ([{"scale": 1}], "adapters[0].name", "adapters[0].name is required"),
        ([{"name": "ink", "scale": "1"}], "adapters[0].scale", "valid number, got '1'"),
        (
            [{"name": "ink"}, {"nam": "a"}],
            "adapters[1].nam",
            "did you mean 'name'?; adapters[1].name is",
        ),
        ([{"name": "ink", "scale": 11}], "adapters", "-10 to 10, got 11"),
        ([{"name": "ink"}] * 2, "adapters", "'ink' is named more than once"),
        ([{"name": "a"}, {"name": "b"}, {"name": "c"}], "adapters", "at most 2"),
    ],
)
async def test_wrong_adapters(
    client: httpx.AsyncClient, adapters: object, param: str, message: str
):
    response = await client.post(URL, json={"prompt": "cat", "adapters": adapters})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


async def test_null_means_left_out(client: httpx.AsyncClient, backend: FakeBackend):
    names = ["model", "n", "size", "response_format", "output_format", "user", "negative_prompt"]
    names += ["num_inference_steps", "guidance_scale", "seed", "scheduler", "adapters"]
    names += ["guidance_start", "guidance_end", "priority", "deadline_s", "reproducible"]
    response = await client.post(URL, json={"prompt": "cat"} | dict.fromkeys(names))

    assert response.status_code == 200
    request = backend.requests[0]
    assert (request.n, request.width) == (1, 64)
    assert (request.guidance_start, request.guidance_end) == (0, 1)
    assert (request.priority, request.deadline_s) == (Priority.NORMAL, None)
    assert request.reproducible is False


async def test_size_auto_is_native(client: httpx.AsyncClient, backend: FakeBackend):
    await client.post(URL, json={"prompt": "cat", "size": "auto"})

    assert (backend.requests[0].width, backend.requests[0].height) == (64, 64)


async def test_missing_seeds_differ(client: httpx.AsyncClient, backend: FakeBackend):
    for _ in range(4):
        await client.post(URL, json={"prompt": "cat"})

    assert len({request.seed for request in backend.requests}) > 1


async def test_another_model_by_name(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses.append(ModelStatus(replace(EMOJI, id="sd-1.5"), ready=True))
    response = await client.post(URL, json={"prompt": "cat", "model": "sd-1.5"})

    assert response.json()["model"] == backend.requests[0].model == "sd-1.5"


async def test_a_loading_model_does_not_stop_the_others(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.statuses.append(ModelStatus(replace(EMOJI, id="sd"), ready=False, detail="loading"))
    response = await client.post(URL, json={"prompt": "cat"})

    assert response.status_code == 200


async def test_given_request_id_is_echoed_and_names_the_request(
    client: httpx.AsyncClient, backend: FakeBackend
):
    headers = {"X-Request-ID": "my.id_1-A"}
    responses = [await client.post(URL, json={"prompt": "c"}, headers=headers) for _ in range(2)]

    assert [answer.headers.get_list("x-request-id") for answer in responses] == [["my.id_1-A"]] * 2
    assert [request.id for request in backend.requests] == ["my.id_1-A"] * 2
    assert [answer.json()["id"] for answer in responses] == ["my.id_1-A"] * 2


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a/b", "é".encode()])
async def test_unusable_request_id_is_replaced(client: httpx.AsyncClient, given: Any):
    response = await client.post(URL, json={"prompt": "c"}, headers={"X-Request-ID": given})

    made = response.headers["x-request-id"]
    assert len(made) == 32
    assert int(made, 16)
