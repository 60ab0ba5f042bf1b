"""Who is let in, what they are told, and what they may use: over HTTP, with the real app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import openai
import pytest
from api_fakes import (
    SETTINGS,
    Blocking,
    Clock,
    FakeBackend,
    client_for,
    make_app,
    make_store,
    raising,
    run_through,
)
from fastapi import FastAPI
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import ApiKey, KeyRing, hash_key, new_key
from stepserve.api.auth.usage import Answer, LocalUsage
from stepserve.config import HttpSettings, Settings
from stepserve.domain.errors import GenerationFailedError, NotReadyError
from stepserve.domain.events import Event
from stepserve.domain.requests import GenerationRequest, Priority, RequestKey

GENERATIONS = "/v1/images/generations"
KEY, OTHER_KEY = new_key(), new_key()


def entry(key: str = KEY, name: str = "app", **limits: Any) -> ApiKey:
    return ApiKey.model_validate({"name": name, "sha256": hash_key(key), **limits})


def client_of(app: FastAPI, key: str | None = KEY) -> httpx.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


def guarded(backend: FakeBackend, *keys: ApiKey, clock: Clock | None = None) -> FastAPI:
    return make_app(backend, keys=keys or [entry()], clock=clock or Clock())


async def draw(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(GENERATIONS, json={"prompt": "cat", **body})


async def test_a_key_lets_its_caller_in(backend: FakeBackend):
    async with client_of(guarded(backend)) as client:
        response = await draw(client)

    assert response.status_code == 200
    assert backend.requests[0].owner == "app"


async def test_openais_client_sends_keys_as_we_want_them(backend: FakeBackend):
    app = guarded(backend)
    # openai declares another httpx than it takes.
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key=KEY, http_client=http) as ai:
        await ai.images.generate(prompt="cat")
        with pytest.raises(openai.AuthenticationError) as refused:
            await ai.with_options(api_key="wrong").images.generate(prompt="cat")

    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "an API key is required: send it as 'Authorization: Bearer KEY'"),
        ("Bearer wrong", "the API key is wrong"),
        (f"Basic {KEY}", "the API key is wrong"),
        (KEY, "the API key is wrong"),
        ("Bearer", "the API key is wrong"),
        (f"Bearer {hash_key(KEY)}", "the API key is wrong"),
    ],
    # Keys differ in each process that tests.
    ids=["none", "wrong", "basic", "bare", "empty", "hash"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", GENERATIONS),
        ("POST", "/v1/images/edits"),
        ("POST", "/v1/images/variations"),
        ("POST", "/v1/images/upscale"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/emoji"),
        ("GET", "/v1/models/emoji/batch"),
        ("GET", "/v1/requests/x"),
        ("DELETE", "/v1/requests/x"),
        ("GET", "/v1/requests/x/events"),
        ("GET", "/v1/no-such-route"),
    ],
)
async def test_without_a_key_nothing_is_told(
    backend: FakeBackend, method: str, path: str, header: str | None, message: str
):
    headers = {} if header is None else {"Authorization": header}
    async with client_of(guarded(backend), key=None) as client:
        response = await client.request(method, path, headers=headers, content=b"not even JSON")

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert response.json()["error"] == {
        "message": message,
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert backend.requests == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
async def test_what_is_open_to_all(backend: FakeBackend, path: str):
    async with client_of(guarded(backend), key=None) as client:
        assert (await client.get(path)).status_code == 200


async def test_every_route_of_the_api_is_guarded_but_for_signed_links(backend: FakeBackend):
    app = guarded(backend)
    paths = [path for path in app.openapi()["paths"] if path.startswith("/v1/")]
    async with client_of(app, key=None) as client:
        statuses = {path: (await client.get(path)).status_code for path in paths}

    assert len(paths) >= 8
    assert {path for path, status in statuses.items() if status != 401} == {"/v1/results/{name}"}


@pytest.mark.parametrize("prefix", ["/images", "/v", "/v1"])
async def test_keys_are_required_below_a_prefix_too(backend: FakeBackend, prefix: str):
    transport = httpx.ASGITransport(app=guarded(backend), root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in (GENERATIONS, prefix + GENERATIONS):
            response = await client.post(path, json={"prompt": "cat"})
            assert response.status_code in (401, 404)

    assert backend.requests == []


async def test_a_signed_link_needs_no_key(backend: FakeBackend):
    async with client_of(guarded(backend)) as client:
        link = (await draw(client, response_format="url")).json()["data"][0]["url"]
        del client.headers["Authorization"]
        assert (await client.get(link)).status_code == 200
        assert (await client.get(link + "0")).status_code == 403


async def test_without_keys_everybody_is_let_in(client: httpx.AsyncClient, backend: FakeBackend):
    assert (await draw(client)).status_code == 200
    assert backend.requests[0].owner == ""


async def test_anothers_request_is_as_unknown_as_none(backend: FakeBackend):
    app = guarded(backend, entry(), entry(OTHER_KEY, "other"))
    async with client_of(app) as client, client_of(app, OTHER_KEY) as other:
        await client.post(GENERATIONS, json={"prompt": "cat"}, headers={"X-Request-ID": "mine"})
        responses = [
            await other.get("/v1/requests/mine"),
            await other.delete("/v1/requests/mine"),
            await other.get("/v1/requests/mine/events"),
            await other.get("/v1/requests/nobodys"),
        ]

    assert {response.status_code for response in responses} == {404}
    assert {response.json()["error"]["code"] for response in responses} == {"request_not_found"}


async def test_who_knows_the_id_of_anothers_request_cannot_end_it(backend: FakeBackend):
    backend.generate_with(Blocking())
    app = guarded(backend, entry(), entry(OTHER_KEY, "other"))
    async with client_of(app) as client, client_of(app, OTHER_KEY) as other:
        body, headers = {"prompt": "cat"}, {"X-Request-ID": "mine"}
        drawing = asyncio.create_task(client.post(GENERATIONS, json=body, headers=headers))
        while not backend.log.is_in_flight(RequestKey("mine", "app")):
            await asyncio.sleep(0)
        refused = await other.delete("/v1/requests/mine")
        told = await client.get("/v1/requests/mine")
        ended = await client.delete("/v1/requests/mine")
        drawing.cancel()

    assert refused.status_code == 404
    assert told.json()["state"] == "queued"
    assert ended.json()["state"] == "cancelled"


async def test_the_keys_priority_is_kept_to(backend: FakeBackend):
    async with client_of(guarded(backend, entry(priority="batch"))) as client:
        refused = await draw(client, priority="interactive")
        await draw(client)

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert [request.priority for request in backend.requests] == [Priority.BATCH]


async def test_the_rate_is_told_and_then_kept(backend: FakeBackend):
    clock = Clock()
    async with client_of(guarded(backend, entry(requests_per_minute=2), clock=clock)) as client:
        responses = [await draw(client) for _ in range(3)]
        clock.now_s += int(responses[2].headers["retry-after"])
        after_waiting = await draw(client)

    assert [response.status_code for response in responses] == [200, 200, 429]
    told = [response.headers["x-ratelimit-remaining-requests"] for response in responses]
    assert told == ["1", "0", "0"]
    assert {response.headers["x-ratelimit-limit-requests"] for response in responses} == {"2"}
    assert responses[0].headers["x-ratelimit-reset-requests"] == "30s"
    assert responses[2].headers["retry-after"] == "30"
    error = responses[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert after_waiting.status_code == 200


async def test_only_requests_for_images_count(backend: FakeBackend):
    async with client_of(guarded(backend, entry(requests_per_minute=1))) as client:
        for _ in range(3):
            assert (await client.get("/v1/models")).status_code == 200
        assert (await draw(client)).status_code == 200


async def test_a_key_without_limits_is_told_none(backend: FakeBackend):
    async with client_of(guarded(backend)) as client:
        response = await draw(client)

    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_so_many_at_once_and_a_place_is_free_again(backend: FakeBackend):
    blocking = Blocking()
    backend.generate_with(blocking)
    async with client_of(guarded(backend, entry(max_concurrent=1))) as client:
        first = asyncio.create_task(draw(client))
        await until(blocking.began.is_set)
        second = await draw(client)
        # As Ray Serve does when the client leaves.
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        backend.stream_with = run_through
        third = await draw(client)

    assert second.status_code == 429
    assert "1 requests in flight; the limit is 1" in second.json()["error"]["message"]
    assert int(second.headers["retry-after"]) >= 1
    assert third.status_code == 200


@pytest.mark.parametrize(
    "error", [GenerationFailedError("x"), NotReadyError("x", 1), KeyError("a bug")]
)
async def test_a_place_is_free_after_any_error(backend: FakeBackend, error: Exception):
    async with client_of(guarded(backend, entry(max_concurrent=1))) as client:
        backend.generate_with(raising(error))
        failed = await draw(client)
        wrong = await draw(client, n=-1)
        unreadable = await client.post(GENERATIONS, content=b"{")
        too_long = await draw(client, negative_prompt="x" * SETTINGS.http.max_body_bytes)
        backend.stream_with = run_through
        good = await draw(client)

    assert failed.status_code >= 500
    assert (wrong.status_code, unreadable.status_code, too_long.status_code) == (400, 415, 413)
    assert good.status_code == 200


async def test_a_stream_has_its_place_until_its_end(backend: FakeBackend):
    begun, ending = asyncio.Event(), asyncio.Event()
    usual = backend.stream_with

    async def slow(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async for event in usual(request):
            yield event
            begun.set()
            await ending.wait()

    backend.stream_with = slow
    async with client_of(guarded(backend, entry(max_concurrent=1))) as client:
        streaming = asyncio.create_task(draw(client, stream=True))
        await begun.wait()
        meanwhile = await draw(client)
        ending.set()
        response = await streaming
        afterwards = await draw(client)

    assert (meanwhile.status_code, afterwards.status_code) == (429, 200)
    assert "image_generation.completed" in response.text


class Leaving:
    """An ASGI client that sends its body and is gone."""

    def __init__(self, body: bytes) -> None:
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        return self._messages.pop() if self._messages else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        pass


@pytest.mark.parametrize("body", [b'{"prompt": "cat"}', b'{"prompt": "cat", "stream": true}'])
async def test_a_place_is_free_when_the_client_is_gone(backend: FakeBackend, body: bytes):
    backend.generate_with(Blocking())
    app = guarded(backend, entry(max_concurrent=1))
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": b""}
    scope |= {"method": "POST", "path": GENERATIONS, "root_path": "", "headers": headers}
    for _ in range(3):
        peer = Leaving(body)
        await asyncio.wait_for(app(dict(scope), peer.receive, peer.send), 10)
    backend.stream_with = run_through
    async with client_of(app) as client:
        assert (await draw(client)).status_code == 200


class Silent:
    """Nobody answers who counts."""

    def __init__(self) -> None:
        self.given_back: list[str] = []

    async def take(self, key: ApiKey, lease: str) -> Answer:
        raise NotReadyError("cannot be counted", 2)

    def give_back(self, name: str, lease: str) -> None:
        self.given_back.append(lease)


class Slow(LocalUsage):
    """Counts, but its response never arrives."""

    async def take(self, key: ApiKey, lease: str) -> Answer:
        await super().take(key, lease)
        return await asyncio.Event().wait()  # type: ignore[return-value]


async def test_nobody_is_let_in_uncounted(backend: FakeBackend):
    usage = Silent()
    access = Access(KeyRing([entry(max_concurrent=1)]), usage)
    async with client_of(create_app(backend, SETTINGS, make_store(), access)) as client:
        response = await draw(client)

    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"]["code"] == "not_ready"
    assert backend.requests == []
    assert len(usage.given_back) == 1


async def test_a_place_is_free_if_the_client_leaves_while_it_is_counted(backend: FakeBackend):
    key, usage = entry(max_concurrent=1), Slow(Clock())
    access = Access(KeyRing([key]), usage)
    async with client_of(create_app(backend, SETTINGS, make_store(), access)) as client:
        waiting = asyncio.create_task(draw(client))
        for _ in range(50):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    assert usage._ledger.take(key, "next").__class__.__name__ == "Grant"


PAGE = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}


def with_cors(origins: Sequence[str]) -> Settings:
    return Settings(http=HttpSettings(cors_origins=tuple(origins)))


async def test_pages_from_elsewhere_may_not_call_by_default(backend: FakeBackend):
    async with client_for(backend) as client:
        asked = await client.options(GENERATIONS, headers=PAGE)
        response = await client.get("/v1/models", headers=PAGE)

    assert asked.status_code == 405
    assert "access-control-allow-origin" not in {*asked.headers, *response.headers}


async def test_pages_that_the_operator_names_may(backend: FakeBackend):
    app = make_app(backend, with_cors(["https://page.example"]), keys=[entry()])
    asking = PAGE | {"Access-Control-Request-Headers": "authorization,content-type"}
    async with client_of(app, key=None) as client:
        asked = await client.options(GENERATIONS, headers=asking)
        refused = await client.get("/v1/models", headers=PAGE)
        elsewhere = await client.options(
            GENERATIONS, headers=asking | {"Origin": "https://other.example"}
        )

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    # The page gets to see why.
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    assert "Retry-After" in refused.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in elsewhere.headers


def test_the_document_says_that_keys_are_sent_as_bearer(backend: FakeBackend):
    document = guarded(backend).openapi()
    [(name, scheme)] = document["components"]["securitySchemes"].items()

    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in document["paths"].items():
        needs_key = path.startswith("/v1/") and not path.startswith("/v1/results/")
        for operation in methods.values():
            assert operation.get("security") == ([{name: []}] if needs_key else None)
            assert ("401" in operation["responses"]) == needs_key


def test_the_document_asks_for_no_keys_where_there_are_none(backend: FakeBackend):
    assert "securitySchemes" not in make_app(backend).openapi()["components"]


async def test_two_keys_work_under_one_id_and_neither_sees_or_ends_the_others(
    backend: FakeBackend,
):
    backend.generate_with(Blocking())
    app = guarded(backend, entry(), entry(OTHER_KEY, "other"))
    async with client_of(app) as client, client_of(app, OTHER_KEY) as other:
        body, headers = {"prompt": "cat"}, {"X-Request-ID": "order"}
        drawing = [
            asyncio.create_task(c.post(GENERATIONS, json=body, headers=headers))
            for c in (client, other)
        ]
        while not backend.log.is_in_flight(RequestKey("order", "other")):
            await asyncio.sleep(0)
        ended = await other.delete("/v1/requests/order")
        told = await client.get("/v1/requests/order")
        for task in drawing:
            task.cancel()

    assert len(backend.requests) == 2
    assert (ended.json()["state"], told.json()["state"]) == ("cancelled", "queued")
