"""`prompts`: several in one call, each with its own seed, its own result and its own failure."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import (
    SETTINGS,
    Blocking,
    FakeBackend,
    Generate,
    client_for,
    finish,
    make_app,
    run_through,
)
from served import served
from stepserve.api.auth.keys import ApiKey, hash_key, new_key
from stepserve.api.bodies.schemas import MAX_LISTED
from stepserve.config import HttpSettings
from stepserve.domain.errors import (
    ContentFilteredError,
    GenerationFailedError,
    InvalidRequestError,
    ServerFullError,
    StepserveError,
)
from stepserve.domain.events import Accepted, Event, Failed, Outcome
from stepserve.domain.requests import GenerationRequest, RequestKey

URL = "/v1/images/generations"
CALL = {"X-Request-ID": "call"}


def failing(**errors: Exception) -> Generate:
    """Make images, but not of these prompts."""

    async def generate(request: GenerationRequest) -> Outcome:
        error = errors.get(request.prompt)
        if error is None:
            return await finish(request)
        if isinstance(error, StepserveError):
            return Failed(request.id, error)
        raise error

    return generate


async def draw(client: httpx.AsyncClient, *prompts: str, **body: Any) -> httpx.Response:
    return await client.post(URL, json={"prompts": list(prompts), **body}, headers=CALL)


def events_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((lines["event"], json.loads(lines["data"])))
    return events


async def test_each_prompt_is_a_request_with_its_own_seed(
    client: httpx.AsyncClient, backend: FakeBackend
):
    response = await draw(client, "cat", "dog", "owl", n=2, seed=7, num_inference_steps=9)
    told = response.json()

    assert response.status_code == 200
    assert [(r.id, r.prompt, r.seed, r.n) for r in backend.requests] == [
        ("call:0", "cat", 7, 2),
        ("call:1", "dog", 9, 2),
        ("call:2", "owl", 11, 2),
    ]
    assert {r.num_inference_steps for r in backend.requests} == {9}
    entries = [(d["prompt_index"], d["seed"], d["parameters"]["prompt"]) for d in told["data"]]
    assert entries == [
        (0, 7, "cat"),
        (0, 8, "cat"),
        (1, 9, "dog"),
        (1, 10, "dog"),
        (2, 11, "owl"),
        (2, 12, "owl"),
    ]
    images = [base64.b64decode(entry["b64_json"]) for entry in told["data"]]
    assert images == [b"seed %d" % seed for seed in range(7, 13)]
    assert {entry["fingerprint"] for entry in told["data"]} == {told["fingerprint"]}
    assert told["data"][2]["timings"] == told["timings"]
    assert "denoise;dur=250.0" in response.headers["server-timing"]
    assert (told["id"], told["seed"]) == ("call", 7)
    assert "error" not in told["data"][0]


async def test_the_parameters_make_the_call_and_each_entrys_its_images_again(
    client: httpx.AsyncClient, backend: FakeBackend
):
    told = (await draw(client, "cat", "dog", n=2)).json()
    call = (await client.post(URL, json=told["parameters"], headers=CALL)).json()
    alone = (await client.post(URL, json=told["data"][2]["parameters"])).json()

    assert told["parameters"]["prompts"] == ["cat", "dog"]
    assert "prompt" not in told["parameters"]
    assert call["data"] == told["data"]
    pairs = [(entry["seed"], entry["b64_json"]) for entry in told["data"][2:]]
    assert [(entry["seed"], entry["b64_json"]) for entry in alone["data"]] == pairs
    assert "prompt_index" not in alone["data"][0]


async def test_prompts_fail_one_by_one_as_they_would_have_alone(
    client: httpx.AsyncClient, backend: FakeBackend
):
    too_long = "x" * 51
    backend.generate_with(
        failing(
            full=ServerFullError("full", 2.5),
            filtered=ContentFilteredError("withheld"),
            broken=GenerationFailedError("/secret/path"),
            bug=KeyError("/secret/path"),
        )
    )
    prompts = ["cat", "", too_long, "full", "filtered", "broken", "bug", "dog"]
    response = await draw(client, *prompts, n=1, seed=7)
    data = response.json()["data"]
    alone = [(await client.post(URL, json={"prompt": p})) for p in prompts[1:-1]]

    assert response.status_code == 200
    assert [entry["prompt_index"] for entry in data] == list(range(8))
    assert [entry["seed"] for entry in data] == list(range(7, 15))
    assert [i for i, entry in enumerate(data) if "b64_json" in entry] == [0, 7]
    for entry, single in zip(data[1:-1], alone, strict=True):
        error, expected = entry["error"], single.json()["error"]
        assert (error["status"], error["code"]) == (single.status_code, expected["code"])
        assert (error.get("param"), error["type"]) == (expected["param"], expected["type"])
    assert data[1]["error"]["message"] == (
        "prompt is empty: text-to-image with model 'emoji' requires one "
        "(it takes: prompt, hires (optional))"
    )
    assert (data[3]["error"]["status"], data[3]["error"]["retry_after_s"]) == (429, 3)
    assert "retry_after_s" not in data[1]["error"]
    assert "/secret" not in response.text
    assert data[5]["parameters"]["prompt"] == "broken"
    assert len(backend.requests) == 6 + 4


@pytest.mark.parametrize(
    ("errors", "status", "code"),
    [
        ([InvalidRequestError("a"), InvalidRequestError("b")], 400, "invalid_value"),
        ([InvalidRequestError("a"), GenerationFailedError("b")], 500, "generation_failed"),
        ([GenerationFailedError("a"), ServerFullError("b", 4)], 429, "server_full"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_where_all_fail_the_call_does(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    errors: list[Exception],
    status: int,
    code: str,
    stream: bool,
):
    backend.generate_with(failing(cat=errors[0], dog=errors[1]))
    response = await draw(client, "cat", "dog", stream=stream)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == ("4" if status == 429 else None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"prompt": "cat", "prompts": ["dog"]},
            "prompt and prompts exclude each other: send one of them",
        ),
        ({"prompts": []}, "prompts is empty: it must have at least one"),
        ({"prompts": ["x"] * 65}, "prompts must have at most 64 entries, got 65"),
        (
            {"prompts": ["x"] * 13, "n": 5},
            "13 prompts with n=5 are 65 images; the limit of one call is 64: send fewer prompts, "
            "or a smaller n",
        ),
    ],
)
async def test_wrong_lists_are_refused_as_a_whole(
    client: httpx.AsyncClient, backend: FakeBackend, body: dict[str, Any], message: str
):
    error = (await client.post(URL, json=body)).json()["error"]

    assert (error["param"], error["message"]) == ("prompts", message)
    assert backend.requests == []


async def test_what_is_wrong_with_all_is_told_once(client: httpx.AsyncClient, backend: FakeBackend):
    steps = await draw(client, "cat", "dog", num_inference_steps=999)
    entry = await client.post(URL, json={"prompts": ["cat", 5]})

    assert steps.json()["error"]["message"] == (
        "num_inference_steps must be 1 to 100, got 999 (with scheduler euler)"
    )
    assert entry.json()["error"]["param"] == "prompts[1]"
    assert backend.requests == []


async def test_a_full_list_is_served(client: httpx.AsyncClient, backend: FakeBackend):
    told = (await draw(client, *map(str, range(MAX_LISTED)))).json()
    listed = (await client.get("/v1/models/emoji")).json()

    assert [entry["prompt_index"] for entry in told["data"]] == list(range(MAX_LISTED))
    assert listed["max_prompts"] == MAX_LISTED


async def test_images_are_links(client: httpx.AsyncClient):
    data = (await draw(client, "cat", "dog", response_format="url", seed=3)).json()["data"]

    images = [(await client.get(entry["url"])).content for entry in data]
    assert images == [b"seed 3", b"seed 4"]


async def test_a_stream_tells_which_prompt_each_event_is_of(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.stream_with = stream_failing("dog")
    response = await draw(client, "dog", "cat", stream=True, partial_images=1, seed=5)
    events = events_in(response.text)

    assert response.status_code == 200
    assert sorted((name, data["prompt_index"]) for name, data in events) == [
        ("error", 0),
        ("image_generation.completed", 1),
        ("image_generation.partial_image", 1),
    ]
    by_name = dict(events)
    completed, error = by_name["image_generation.completed"], by_name["error"]["error"]
    assert (completed["id"], completed["seed"]) == ("call:1", 6)
    assert completed["parameters"]["prompt"] == "cat"
    assert (error["status"], error["code"]) == (429, "server_full")


def stream_failing(prompt: str) -> Any:
    async def stream(request: GenerationRequest) -> AsyncIterator[Event]:
        if request.prompt == prompt:
            yield Failed(request.id, ServerFullError("full", 3))
            return
        async for event in run_through(request):
            yield event

    return stream


async def test_what_is_finished_in_time_is_sent(backend: FakeBackend):
    async def slowly(request: GenerationRequest) -> Outcome:
        if request.prompt == "slow":
            await asyncio.Event().wait()
        return await finish(request)

    backend.generate_with(slowly)
    http = SETTINGS.http.model_copy(update={"request_timeout_s": 0.2})
    async with client_for(backend, SETTINGS.model_copy(update={"http": http})) as client:
        whole = await draw(client, "cat", "slow")
        streamed = events_in((await draw(client, "cat", "slow", stream=True)).text)

    assert whole.status_code == 200
    assert "b64_json" in whole.json()["data"][0]
    assert whole.json()["data"][1]["error"]["code"] == "timeout"
    assert streamed[-1][1]["error"]["code"] == "timeout"
    assert streamed[-1][1]["prompt_index"] == 1


async def blocked(client: httpx.AsyncClient, backend: FakeBackend) -> asyncio.Task[httpx.Response]:
    """A call of two prompts that are being worked on."""
    backend.generate_with(Blocking())
    drawing = asyncio.create_task(draw(client, "cat", "dog", num_inference_steps=20))
    while not backend.log.is_in_flight(RequestKey("call:1")):
        await asyncio.sleep(0)
    return drawing


async def test_a_call_is_followed_and_cancelled_as_one(
    client: httpx.AsyncClient, backend: FakeBackend
):
    drawing = await blocked(client, backend)
    backend.log.add(RequestKey("call:1"), Accepted("call:1", 3, 9.0))
    queued = (await client.get("/v1/requests/call")).json()
    of_one = (await client.get("/v1/requests/call:1")).json()
    ended = (await client.delete("/v1/requests/call")).json()
    drawing.cancel()
    again = (await client.delete("/v1/requests/call")).json()
    followed = events_in((await client.get("/v1/requests/call/events")).text)

    assert (queued["id"], queued["state"], queued["steps"]) == ("call", "queued", 40)
    assert [prompt["id"] for prompt in queued["prompts"]] == ["call:0", "call:1"]
    assert 8 < queued["expected_s"] <= 9
    assert "prompts" not in of_one
    assert ended["state"] == again["state"] == "cancelled"
    assert {prompt["state"] for prompt in ended["prompts"]} == {"cancelled"}
    failed = [data for name, data in followed if name == "failed"]
    assert sorted((data["id"], data["prompt_index"]) for data in failed) == [
        ("call:0", 0),
        ("call:1", 1),
    ]


async def test_a_call_is_finished_if_one_of_its_prompts_is(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.generate_with(failing(dog=GenerationFailedError("no")))
    await draw(client, "cat", "dog", "owl", num_inference_steps=20)
    told = (await client.get("/v1/requests/call")).json()

    assert (told["state"], told["error"]) == ("finished", None)
    states = [prompt["state"] for prompt in told["prompts"]]
    assert states == ["finished", "failed", "finished"]
    assert (told["step"], told["steps"]) == (40, 60)


async def test_the_same_id_at_work_is_refused(client: httpx.AsyncClient, backend: FakeBackend):
    drawing = await blocked(client, backend)
    response = await draw(client, "cat", "dog")
    drawing.cancel()

    assert response.status_code == 409
    assert response.json()["error"]["code"] == "request_id_in_use"


def test_the_client_leaving_cancels_all(backend: FakeBackend):
    with served(make_app(backend), HttpSettings()) as port:
        url = f"http://127.0.0.1:{port}"
        backend.stream_with = accepted_for_ever
        body = {"prompts": ["cat", "dog"], "stream": True}
        with httpx.stream("POST", url + URL, json=body, headers=CALL) as response:
            assert response.status_code == 200
        for _ in range(200):
            told = httpx.get(f"{url}/v1/requests/call").json()
            if told["state"] == "cancelled":
                break

    assert [prompt["state"] for prompt in told["prompts"]] == ["cancelled", "cancelled"]


async def accepted_for_ever(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Accepted(request.id, 0, None)
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("limits", "remaining"),
    [({"requests_per_minute": 2}, "0"), ({"max_concurrent": 2}, None)],
)
async def test_each_prompt_counts_as_a_request_of_its_key(
    backend: FakeBackend, limits: dict[str, Any], remaining: str | None
):
    key = new_key()
    entry = ApiKey.model_validate({"name": "app", "sha256": hash_key(key), **limits})
    backend.generate_with(finish_once_two_are_there(backend))
    async with client_for(backend, keys=[entry]) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        response = await draw(client, "cat", "dog", "owl")

    data = response.json()["data"]
    assert response.status_code == 200
    assert ["b64_json" in entry for entry in data] == [True, True, False]
    assert (data[2]["error"]["status"], data[2]["error"]["code"]) == (429, "rate_limit_exceeded")
    assert data[2]["error"]["retry_after_s"] >= 1
    assert response.headers.get("x-ratelimit-remaining-requests") == remaining


def finish_once_two_are_there(backend: FakeBackend) -> Generate:
    async def generate(request: GenerationRequest) -> Outcome:
        while len(backend.requests) < 2:
            await asyncio.sleep(0)
        return await finish(request)

    return generate


async def test_places_are_given_back_as_prompts_end(backend: FakeBackend):
    key = new_key()
    limits = {"name": "app", "sha256": hash_key(key), "max_concurrent": 2}
    async with client_for(backend, keys=[ApiKey.model_validate(limits)]) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        for _ in range(2):
            response = await draw(client, "cat", "dog")
            assert ["b64_json" in entry for entry in response.json()["data"]] == [True, True]


async def test_requests_differ_in_prompt_seed_and_name_only(
    client: httpx.AsyncClient, backend: FakeBackend
):
    await draw(client, "cat", "dog", seed=1)
    first, second = backend.requests

    assert replace(first, id=second.id, prompt="dog", seed=2) == second


async def test_requests_of_a_call_that_come_later_are_followed_and_cancelled_too(
    client: httpx.AsyncClient, backend: FakeBackend
):
    await draw(client, "cat", "dog")
    found = backend.prompts
    known = iter([1])

    async def some(call: RequestKey) -> Any:
        prompts = await found(call)
        return prompts[: next(known, len(prompts))]

    backend.prompts = some
    followed = events_in((await client.get("/v1/requests/call/events")).text)
    assert [d["prompt_index"] for name, d in followed if name == "finished"] == [0, 1]

    backend.prompts = found
    drawing = await blocked(client, backend)
    known = iter([1])
    backend.prompts = some
    ended = (await client.delete("/v1/requests/call")).json()
    drawing.cancel()
    assert [prompt["state"] for prompt in ended["prompts"]] == ["cancelled", "cancelled"]


async def test_a_form_holds_them_as_json(client: httpx.AsyncClient, backend: FakeBackend):
    files: Any = {"prompts": (None, json.dumps(["cat", "dog"])), "n": (None, "2")}
    response = await client.post(URL, files=files)
    wrong = await client.post(URL, files={"prompts": (None, "cat")})

    assert response.status_code == 200, response.text
    assert [(request.prompt, request.n) for request in backend.requests] == [("cat", 2), ("dog", 2)]
    assert wrong.json()["error"]["message"] == (
        'prompts must be a list such as ["red heart", "smiling cat"], got \'cat\''
    )
