from __future__ import annotations

import re

import httpx
from api_fakes import TIMINGS, FakeBackend, client_for


async def test_the_id_can_be_left_to_a_proxy(backend: FakeBackend):
    async with client_for(backend, echo_request_id=False) as client:
        response = await client.get("/nowhere", headers={"X-Request-ID": "mine"})

    assert "x-request-id" not in response.headers


async def test_every_answer_tells_how_long_it_took(client: httpx.AsyncClient):
    paths = ("/healthz", "/v1/models", "/v1/requests/nobody", "/nowhere", "/")
    told = [(await client.get(path)).headers["server-timing"] for path in paths]
    made = await client.post("/v1/images/generations", json={"prompt": "cat"})

    assert all(re.fullmatch(r"total;dur=[0-9.]+", header) for header in told)
    assert made.headers.get_list("server-timing") == [TIMINGS.server_timing()]
