"""`/v1/requests/{id}`: how far a request is, cancelling and following it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from typing import Any

import httpx
import pytest
from api_fakes import Blocking, FakeBackend, finish
from stepserve.domain.events import Accepted, StepFinished
from stepserve.domain.reports import BatchView, RequestInBatch, RowsInForward, SharedForward
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState

URL = "/v1/images/generations"


async def make(client: httpx.AsyncClient, request_id: str, **body: Any) -> httpx.Response:
    headers = {"X-Request-ID": request_id}
    return await client.post(URL, json={"prompt": "cat", **body}, headers=headers)


def parse(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return events


async def test_a_finished_request_is_told(client: httpx.AsyncClient, backend: FakeBackend):
    backend.generate_with(finish)
    await make(client, "done", num_inference_steps=7)
    told = (await client.get("/v1/requests/done")).json()

    assert told["id"] == "done"
    assert told["state"] == "finished"
    assert (told["step"], told["steps"]) == (7, 7)
    assert told["timings"]["denoise_s"] == 0.25
    assert told["error"] is None


async def test_a_running_request_is_told_and_cancelled(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.generate_with(Blocking())
    making = asyncio.create_task(make(client, "slow"))
    while not backend.log.is_in_flight(RequestKey("slow")):
        await asyncio.sleep(0)
    backend.log.add(RequestKey("slow"), Accepted("slow", 3, 9.0))
    queued = (await client.get("/v1/requests/slow")).json()
    backend.log.add(RequestKey("slow"), StepFinished("slow", 2, 20))
    running = (await client.get("/v1/requests/slow")).json()
    cancelled = await client.delete("/v1/requests/slow")
    again = await client.delete("/v1/requests/slow")
    making.cancel()

    assert (queued["state"], queued["position"]) == ("queued", 3)
    assert 8 < queued["expected_s"] <= 9
    assert (running["step"], running["steps"]) == (2, 20)
    assert cancelled.json()["state"] == again.json()["state"] == "cancelled"
    assert cancelled.json()["error"]["code"] == "request_cancelled"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", ["", "/events"])
async def test_unknown_requests_are_404(client: httpx.AsyncClient, method: str, path: str):
    if method == "DELETE" and path:
        return
    response = await client.request(method, f"/v1/requests/nobody{path}")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"


async def test_events_are_replayed_from_where_a_client_was(client: httpx.AsyncClient):
    await make(client, "followed", stream=True, previews=1)
    whole = parse((await client.get("/v1/requests/followed/events")).text)
    rest = await client.get("/v1/requests/followed/events", headers={"Last-Event-ID": "3"})
    nothing = await client.get("/v1/requests/followed/events", headers={"Last-Event-ID": "5"})

    names = ["accepted", "started", "step", "preview", "step", "finished"]
    assert [(number, name) for number, name, _ in whole] == list(enumerate(names))
    assert base64.b64decode(whole[3][2]["images"][0]["b64_json"]) == b"preview 0"
    assert whole[4][2] == {"id": "followed", "step": 2, "steps": 2}
    assert parse(rest.text) == whole[4:]
    assert nothing.text == ""


@pytest.mark.virtual_time
async def test_a_request_may_be_unknown_for_moments_while_it_is_followed(
    client: httpx.AsyncClient, backend: FakeBackend
):
    """As between a replica that was lost and the next try."""
    await make(client, "followed", stream=True)
    backend.unheard = iter((True, True))
    told = parse((await client.get("/v1/requests/followed/events")).text)
    backend.unheard = itertools.repeat(True)
    forgotten = await client.get("/v1/requests/followed/events")

    assert [name for _, name, _ in told][-1] == "finished"
    assert forgotten.status_code == 200
    assert set(forgotten.text.split("\n")) == {": keep-alive", ""}


@pytest.mark.parametrize("wrong", ["-1", "x", "1" * 30, "²"])
async def test_wrong_event_numbers_are_refused(client: httpx.AsyncClient, wrong: str):
    await make(client, "followed")
    headers = {b"Last-Event-ID": wrong.encode()}
    response = await client.get("/v1/requests/followed/events", headers=headers)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"


async def test_an_id_at_work_is_refused_and_one_that_ended_is_not(
    client: httpx.AsyncClient, backend: FakeBackend
):
    await make(client, "twice")
    assert (await make(client, "twice")).status_code == 200
    backend.generate_with(Blocking())
    making = asyncio.create_task(make(client, "twice"))
    while not backend.log.is_in_flight(RequestKey("twice")):
        await asyncio.sleep(0)
    response = await make(client, "twice")
    making.cancel()

    assert response.status_code == 409
    assert response.json()["error"]["code"] == "request_id_in_use"


async def test_the_batch_is_shown(client: httpx.AsyncClient, backend: FakeBackend):
    requests = (
        RequestInBatch("mine", RequestState.RUNNING, 3, 20, 2, skipped=1),
        RequestInBatch(None, RequestState.QUEUED, 0, 4, 1),
    )
    rows = (RowsInForward("mine", 2), RowsInForward(None, 1))
    forward = SharedForward(7, "unet.forward", 3, 5, 0.02, rows, ("mine", None))
    backend.batches = [BatchView(36, requests, (forward,))]
    response = (await client.get("/v1/models/emoji/batch")).json()

    [replica] = response["replicas"]
    shown = [(request["id"], request["skipped"]) for request in replica["requests"]]
    assert shown == [("mine", 1), (None, 0)]
    assert replica["forwards"] == [
        {
            "number": 7,
            "module": "unet.forward",
            "rows": 3,
            "padded_rows": 5,
            "seconds": 0.02,
            "requests": [{"id": "mine", "rows": 2}, {"id": None, "rows": 1}],
            "skipped": ["mine", None],
        }
    ]
    assert (await client.get("/v1/models/nothing/batch")).status_code == 404
