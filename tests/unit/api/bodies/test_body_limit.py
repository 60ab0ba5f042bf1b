from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable

import httpx
from api_fakes import SETTINGS, FakeBackend

URL = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
LIMIT = SETTINGS.http.max_body_bytes


async def chunks(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def endless(sent: list[int]) -> AsyncIterator[bytes]:
    while True:
        sent.append(1)
        yield b" " * 100


async def never_read() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read")
    yield b""


def assert_too_large(response: httpx.Response) -> None:
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("body_too_large", "invalid_request_error")
    assert f"the limit is {LIMIT} bytes" in error["message"]
    assert response.headers["x-request-id"]


async def test_declared_length_over_the_limit_is_refused_unread(client: httpx.AsyncClient):
    headers = JSON | {"Content-Length": str(LIMIT + 1)}

    assert_too_large(await client.post(URL, content=never_read(), headers=headers))


async def test_endless_chunks_are_cut_off(client: httpx.AsyncClient):
    sent: list[int] = []

    assert_too_large(await client.post(URL, content=endless(sent), headers=JSON))
    assert len(sent) == LIMIT // 100 + 1


async def test_a_false_length_helps_nothing(client: httpx.AsyncClient, backend: FakeBackend):
    headers = JSON | {"Content-Length": "10"}

    assert_too_large(await client.post(URL, content=endless([]), headers=headers))
    assert backend.requests == []


async def test_the_limit_holds_on_every_url(client: httpx.AsyncClient):
    assert_too_large(await client.post("/nowhere", content=b" " * (LIMIT + 1)))


async def test_a_body_of_just_the_limit_passes(client: httpx.AsyncClient):
    body = json.dumps({"prompt": "cat"}).encode().ljust(LIMIT)

    assert (await client.post(URL, content=body, headers=JSON)).status_code == 200
    assert_too_large(await client.post(URL, content=body + b" ", headers=JSON))


async def test_a_chunked_body_arrives_whole(client: httpx.AsyncClient, backend: FakeBackend):
    content = chunks([b'{"pro', b'mpt": ', b"", b'"cat"}'])
    response = await client.post(URL, content=content, headers=JSON)

    assert response.status_code == 200
    assert backend.requests[0].prompt == "cat"
