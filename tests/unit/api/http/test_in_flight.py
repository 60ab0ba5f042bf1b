"""A server that stops: every exchange that is in flight hears how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from api_fakes import Blocking, FakeBackend, finish, make_app
from fastapi import FastAPI
from stepserve.api.http.in_flight import InFlight
from stepserve.domain.events import Accepted, Event, Outcome
from stepserve.domain.requests import GenerationRequest

URL = "/v1/images/generations"


@pytest.fixture
def app(backend: FakeBackend) -> FastAPI:
    return make_app(backend)


@pytest.fixture
def in_flight(app: FastAPI) -> InFlight:
    return app.state.in_flight


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


class Gate:
    """Finishes requests once it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, request: GenerationRequest) -> Outcome:
        await self.opened.wait()
        return await finish(request)


async def never_ending(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Accepted(request.id, 0, 0.5)
    await asyncio.Event().wait()


async def begin(
    client: httpx.AsyncClient, backend: FakeBackend, **body: Any
) -> asyncio.Task[httpx.Response]:
    headers = {"X-Request-ID": "r"}
    asked = client.post(URL, json={"prompt": "cat", **body}, headers=headers)
    asking = asyncio.create_task(asked)
    while not backend.requests:
        await asyncio.sleep(0)
    return asking


async def test_without_exchanges_there_is_nothing_to_wait_for(in_flight: InFlight):
    assert await in_flight.settle(60.0) == 0
    assert not in_flight.stopped.is_set()


async def test_what_ends_in_time_is_waited_for(
    client: httpx.AsyncClient, backend: FakeBackend, in_flight: InFlight
):
    gate = Gate()
    backend.generate_with(gate)
    asking = await begin(client, backend)
    settling = asyncio.create_task(in_flight.settle(60.0))
    await asyncio.sleep(0)
    assert not settling.done()
    gate.opened.set()
    assert await settling == 0
    assert (await asking).status_code == 200


async def test_newcomers_are_not_waited_for(
    client: httpx.AsyncClient, backend: FakeBackend, in_flight: InFlight
):
    """They are refused by the models, and there may always be another one."""
    gate = Gate()
    backend.generate_with(gate)
    asking = await begin(client, backend)
    settling = asyncio.create_task(in_flight.settle(60.0))
    await asyncio.sleep(0)
    backend.generate_with(Blocking())
    backend.requests.clear()
    newcomer = await begin(client, backend)
    gate.opened.set()
    assert await settling == 0
    await asking
    newcomer.cancel()


async def test_who_is_late_is_told_that_the_server_stops(
    client: httpx.AsyncClient, backend: FakeBackend, in_flight: InFlight
):
    work = Blocking()
    backend.generate_with(work)
    asking = await begin(client, backend)
    assert await in_flight.settle(0.0) == 1
    response = await asking
    assert (response.status_code, response.json()["error"]["code"]) == (503, "server_stopped")
    assert int(response.headers["retry-after"]) >= 1
    assert work.cancelled.is_set()


async def test_a_stream_ends_with_an_error(
    client: httpx.AsyncClient, backend: FakeBackend, in_flight: InFlight
):
    backend.stream_with = never_ending
    asking = await begin(client, backend, stream=True)
    await in_flight.settle(0.0)
    response = await asking
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\n")
    assert '"code":"server_stopped"' in last


async def test_a_follower_is_told(
    client: httpx.AsyncClient, backend: FakeBackend, in_flight: InFlight
):
    backend.generate_with(Blocking())
    asking = await begin(client, backend)
    following = asyncio.create_task(client.get("/v1/requests/r/events"))
    while len(in_flight._exchanges) < 2:
        await asyncio.sleep(0)
    while not backend.asked_for_events:
        await asyncio.sleep(0)
    await in_flight.settle(0.0)
    last = (await following).text.strip().split("\n\n")[-1]
    assert last.startswith("event: failed\n")
    assert '"code":"server_stopped"' in last or '"code":"request_cancelled"' in last
    await asking
