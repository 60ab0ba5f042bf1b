from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from api_fakes import SETTINGS, FakeBackend, client_for, make_app, make_store
from served import connect, read_all, served
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.exchange_context import Exchange
from stepserve.api.observe.exchanges import Observation
from stepserve.config import HttpSettings, Settings
from stepserve.domain.events import Accepted, Event
from stepserve.domain.requests import GenerationRequest

PAGE = "https://page.example"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
PRIVATE = PREFLIGHT | {"Access-Control-Request-Private-Network": "true"}
ALLOW_PRIVATE = "access-control-allow-private-network"

GETS = [
    "/healthz",
    "/readyz",
    "/metrics",
    "/",
    "/docs",
    "/docs/assets/swagger-ui.css",
    "/openapi.json",
    "/v1/models",
    "/v1/models/emoji",
    "/v1/models/emoji/batch",
    "/v1/requests/none",
    "/v1/requests/none/events",
    "/v1/results/none.png",
    "/nowhere",
]


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_its_body(client: httpx.AsyncClient, path: str):
    got, head = await client.get(path), await client.head(path)

    assert head.status_code == got.status_code
    assert head.content == b""
    for name in ("content-type", "content-length", "etag", "cache-control"):
        assert head.headers.get(name) == got.headers.get(name)


async def test_head_is_told_with_its_route(backend: FakeBackend):
    told: list[Exchange] = []
    observation = Observation(listeners=(told.append,))
    access = Access(KeyRing(), LocalUsage(lambda: 0.0))
    app = create_app(backend, SETTINGS, make_store(), access, observation)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.head("/v1/models/emoji")

    assert (told[0].method, told[0].route) == ("HEAD", "/v1/models/{id}")


def test_head_on_a_real_connection(backend: FakeBackend):
    with served(make_app(backend), HttpSettings()) as port, connect(port) as client:
        client.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        client.sendall(b"HEAD /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        heads = read_all(client).split(b"\r\n\r\n")

    assert [head.split(b"\r\n")[0] for head in heads] == [b"HTTP/1.1 200 OK"] * 2 + [b""]
    assert all(b"content-length: " in head for head in heads[:2])


async def test_head_of_a_stream_ends(backend: FakeBackend):
    async def silent(request: GenerationRequest) -> AsyncIterator[Event]:
        yield Accepted(request.id, 0, 0.5)
        await asyncio.Event().wait()

    backend.stream_with = silent
    async with client_for(backend) as client:
        body = {"prompt": "cat", "stream": True}
        named = {"X-Request-ID": "mine"}
        streaming = asyncio.create_task(
            client.post("/v1/images/generations", json=body, headers=named)
        )
        while not backend.requests:
            await asyncio.sleep(0)
        head = await asyncio.wait_for(client.head("/v1/requests/mine/events"), 5)
        streaming.cancel()

    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/healthz", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
        ("/docs/assets/swagger-ui.css", "GET, HEAD"),
        ("/v1/images/generations", "POST"),
        ("/v1/requests/some", "DELETE, GET, HEAD"),
    ],
)
async def test_every_method_of_a_path_is_told(client: httpx.AsyncClient, path: str, methods: str):
    asked, wrong = await client.options(path), await client.put(path)

    assert (asked.status_code, asked.headers["allow"]) == (204, f"{methods}, OPTIONS")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, methods)
    assert f"use {methods}" in wrong.json()["error"]["message"]


async def test_a_path_that_is_none_has_no_methods(client: httpx.AsyncClient):
    response = await client.options("/nowhere")

    assert response.status_code == 404
    assert "allow" not in response.headers


async def test_private_networks_are_open_to_pages_that_the_operator_names(backend: FakeBackend):
    settings = Settings(http=HttpSettings(cors_origins=(PAGE,)))
    async with client_for(backend, settings) as client:
        ours = await client.options("/v1/images/generations", headers=PRIVATE)
        other = PRIVATE | {"Origin": "https://other.example"}
        theirs = await client.options("/v1/images/generations", headers=other)
        without = await client.options("/v1/images/generations", headers=PREFLIGHT)

    assert (ours.status_code, ours.headers[ALLOW_PRIVATE]) == (200, "true")
    assert theirs.status_code == 400
    assert ALLOW_PRIVATE not in {*theirs.headers, *without.headers}
    assert "access-control-allow-origin" not in theirs.headers


async def test_private_networks_are_closed_by_default(client: httpx.AsyncClient):
    response = await client.options("/v1/images/generations", headers=PRIVATE)

    assert response.status_code == 405
    assert ALLOW_PRIVATE not in response.headers
