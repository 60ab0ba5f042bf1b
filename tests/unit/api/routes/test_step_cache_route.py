"""`step_cache` in the bodies of requests: what it means, what is told of it, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import TIMINGS, FakeBackend, data_url, image_file
from stepserve.domain.events import Finished, Outcome
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse

URL = "/v1/images/generations"
EASYCACHE, MAGCACHE = StepCacheMethod.EASYCACHE, StepCacheMethod.MAGCACHE
OF_MODEL = StepCacheUse(MAGCACHE, 0.3)
Made = tuple[StepCacheUse | None, dict[str, Any]]


@pytest.fixture
def has_default(backend: FakeBackend) -> None:
    """Its model has both methods, and one of them by default."""
    serve(backend, step_cache_methods=(EASYCACHE, MAGCACHE), default_step_cache=OF_MODEL)


def serve(backend: FakeBackend, **changes: Any) -> None:
    (status,) = backend.statuses
    backend.statuses = [replace(status, capabilities=replace(status.capabilities, **changes))]


async def draw(client: httpx.AsyncClient, backend: FakeBackend, **body: Any) -> Made:
    """What the model was asked for, and the parameters in the response."""
    response = await client.post(URL, json={"prompt": "cat", **body})
    assert response.status_code == 200, response.text
    return backend.requests[-1].step_cache, response.json()["parameters"]


@pytest.mark.parametrize(
    ("sent", "used"),
    [
        ({"method": "easycache", "threshold": 0.2}, StepCacheUse(EASYCACHE, 0.2)),
        ({"method": "easycache"}, StepCacheUse()),
        ({"threshold": 1}, StepCacheUse(EASYCACHE, 1)),
        ({}, StepCacheUse()),
        ("easycache", StepCacheUse()),
        ({"method": "magcache"}, StepCacheUse(MAGCACHE, MAGCACHE.usual_threshold)),
    ],
)
async def test_a_request_says_what_decides(
    client: httpx.AsyncClient, backend: FakeBackend, sent: Any, used: StepCacheUse
):
    serve(backend, step_cache_methods=(EASYCACHE, MAGCACHE))
    asked, told = await draw(client, backend, step_cache=sent)

    assert asked == used
    assert told["step_cache"] == {"method": used.method, "threshold": used.threshold}


@pytest.mark.parametrize("sent", ["off", {"method": "off"}, None])
async def test_without_one_every_call_runs(
    client: httpx.AsyncClient, backend: FakeBackend, sent: Any
):
    asked, told = await draw(client, backend, step_cache=sent)

    assert asked is None
    assert told["step_cache"] == "off"


@pytest.mark.usefixtures("has_default")
@pytest.mark.parametrize(
    ("body", "used"),
    [
        ({}, OF_MODEL),
        ({"step_cache": None}, OF_MODEL),
        ({"step_cache": "off"}, None),
        ({"step_cache": {"threshold": 0.2}}, StepCacheUse(EASYCACHE, 0.2)),
    ],
)
async def test_the_default_of_a_model_is_filled_in(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    body: dict[str, Any],
    used: StepCacheUse | None,
):
    assert (await draw(client, backend, **body))[0] == used


@pytest.mark.usefixtures("has_default")
@pytest.mark.parametrize("sent", ["off", {"method": "easycache", "threshold": 0.25}, None])
async def test_the_parameters_of_a_response_make_the_same_request(
    client: httpx.AsyncClient, backend: FakeBackend, sent: Any
):
    _, parameters = await draw(client, backend, step_cache=sent, seed=3)
    again = await client.post(URL, json=parameters)

    assert again.status_code == 200, again.text
    first, second = backend.requests
    assert replace(first, id="") == replace(second, id="")


@pytest.mark.parametrize("text", ["off", '"off"', '{"threshold": 0.2}', "easycache"])
async def test_forms_hold_it_as_json_or_as_a_word(
    client: httpx.AsyncClient, backend: FakeBackend, text: str
):
    serve(backend, default_step_cache=OF_MODEL)
    form = {"prompt": (None, "cat"), "step_cache": (None, text)}
    response = await client.post(URL, files=form)

    assert response.status_code == 200, response.text
    uses = {'{"threshold": 0.2}': StepCacheUse(threshold=0.2), "easycache": StepCacheUse()}
    assert backend.requests[0].step_cache == uses.get(text)


async def test_a_form_may_hold_its_parts(client: httpx.AsyncClient, backend: FakeBackend):
    form = {
        "prompt": (None, "cat"),
        "step_cache[method]": (None, "easycache"),
        "step_cache[threshold]": (None, "0.4"),
    }
    response = await client.post(URL, files=form)

    assert response.status_code == 200, response.text
    assert backend.requests[0].step_cache == StepCacheUse(EASYCACHE, 0.4)


async def test_edits_take_it(client: httpx.AsyncClient, backend: FakeBackend):
    image = {"image_url": data_url(image_file("red"))}
    body = {"prompt": "cat", "image": image, "mask": image, "step_cache": "easycache"}
    response = await client.post("/v1/images/edits", json=body)

    assert response.status_code == 200, response.text
    assert backend.requests[0].step_cache == StepCacheUse()


@pytest.mark.parametrize(
    ("step_cache", "param", "message"),
    [
        ({"method": "magcache"}, "step_cache.method", "'magcache' cannot be used with model"),
        ({"method": "magcache"}, "step_cache.method", "(usable: easycache); its operator adds"),
        ('{"method": "easycache"}', "step_cache", "that is a text: write it without quotes"),
        ("{bad", "step_cache", "that is not valid JSON"),
        ({"method": "fast"}, "step_cache.method", "must be 'easycache', 'magcache' or 'off'"),
        ("fast", "step_cache.method", "got 'fast'"),
        ({"threshold": 0}, "step_cache.threshold", "must be 0.001 to 1, got 0"),
        ({"threshold": 1.5}, "step_cache.threshold", "must be 0.001 to 1, got 1.5"),
        ({"threshold": "0.1"}, "step_cache.threshold", "must be a valid number"),
        ({"treshold": 0.1}, "step_cache.treshold", "did you mean 'threshold'?"),
        ({"reuse_threshold": 0.1}, "step_cache.reuse_threshold", "did you mean 'threshold'?"),
        ({"name": "easycache"}, "step_cache.name", "did you mean 'method'?"),
        (0.1, "step_cache", 'step_cache must be an object such as {"method": "easycache"'),
        (True, "step_cache", "step_cache must be an object"),
        (["easycache"], "step_cache", "step_cache must be an object"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, step_cache: Any, param: str, message: str
):
    response = await client.post(URL, json={"prompt": "cat", "step_cache": step_cache})
    error = response.json()["error"]

    assert response.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert not backend.requests


async def test_json_has_no_number_that_is_none(client: httpx.AsyncClient):
    body = '{"prompt": "cat", "step_cache": {"threshold": NaN}}'
    headers = {"Content-Type": "application/json"}
    response = await client.post(URL, content=body, headers=headers)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "step_cache.threshold"


@pytest.mark.parametrize("name", ["teacache", "enable_teacache", "cache_config", "step_cahce"])
async def test_other_names_are_explained(client: httpx.AsyncClient, name: str):
    response = await client.post(URL, json={"prompt": "cat", name: True})
    error = response.json()["error"]

    assert response.status_code == 400
    assert f"unknown field '{name}'; did you mean 'step_cache'?" in error["message"]


async def test_a_model_that_can_skip_nothing_says_so(
    client: httpx.AsyncClient, backend: FakeBackend
):
    serve(backend, step_cache_methods=())
    response = await client.post(URL, json={"prompt": "cat", "step_cache": {}})
    error = response.json()["error"]

    assert response.status_code == 400
    assert error["param"] == "step_cache"
    assert error["message"] == "step_cache must be 'off': model 'emoji' can skip no calls"
    assert (await draw(client, backend, step_cache="off"))[0] is None


@pytest.mark.usefixtures("has_default")
async def test_the_model_tells_what_it_has(client: httpx.AsyncClient):
    told = (await client.get("/v1/models/emoji")).json()

    assert told["step_cache_methods"] == ["easycache", "magcache"]
    assert told["default_step_cache"] == {"method": "magcache", "threshold": 0.3}


async def test_a_model_may_have_no_default(client: httpx.AsyncClient):
    told = (await client.get("/v1/models/emoji")).json()

    assert told["step_cache_methods"] == ["easycache"]
    assert told["default_step_cache"] is None
    assert told["fingerprint"]["step_cache"] == ""


async def test_the_response_tells_how_many_calls_ran(
    client: httpx.AsyncClient, backend: FakeBackend
):
    timings = replace(TIMINGS, denoiser_calls=50, denoiser_calls_run=23)

    async def generate(request: GenerationRequest) -> Outcome:
        return Finished(request.id, (), timings)

    backend.generate_with(generate)
    response = await client.post(URL, json={"prompt": "cat", "step_cache": {}})
    told = response.json()["timings"]

    assert 'forwards;desc="23 of 50"' in response.headers["Server-Timing"]
    assert (told["denoiser_calls"], told["denoiser_calls_run"]) == (50, 23)


@pytest.mark.usefixtures("has_default")
async def test_a_stream_tells_what_was_used(client: httpx.AsyncClient, backend: FakeBackend):
    async with client.stream("POST", URL, json={"prompt": "cat", "stream": True}) as response:
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    completed = json.loads(lines[-1].removeprefix("data: "))

    assert completed["parameters"]["step_cache"] == {"method": "magcache", "threshold": 0.3}
    assert completed["timings"]["denoiser_calls"] == TIMINGS.denoiser_calls
