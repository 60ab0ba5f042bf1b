"""The client that sends on a schedule, against a small HTTP server on this machine."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web
from PIL import Image

from loadtests.load.client import (
    Patience,
    Status,
    Target,
    complaint_about,
    endless_patience,
    open_session,
    send_open_loop,
    send_windowed,
)
from loadtests.load.http_shape import EDITS, GENERATIONS, read_server_timing
from loadtests.load.trace import HOMOGENEOUS, arrivals_at, draw_trace

Handler = Callable[[web.Request], Awaitable[web.Response]]
TRACE = draw_trace(HOMOGENEOUS, 20, 0)
TIMING = 'queue;dur=2.5, first-step;dur=10.0, total;dur=50.0, batch;desc="share 0.250"'


def drawn_image(size: str = "64x64") -> str:
    width, height = map(int, size.split("x"))
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def response(request: web.Request) -> web.Response:
    body = await request.json()
    data = [{"b64_json": drawn_image(body["size"])} for _ in range(body["n"])]
    return web.json_response({"data": data}, headers={"Server-Timing": TIMING})


async def never(request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Target]:
    app = web.Application()
    for url in (GENERATIONS, EDITS):
        app.router.add_post(url, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield Target(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


async def test_answers_are_read_with_what_the_server_told() -> None:
    async with served(response) as target, open_session(target) as session:
        (outcome,) = await send_open_loop(session, TRACE[:1], [0.0], endless_patience(1))
    assert (outcome.status, outcome.http_status) == (Status.OK, 200)
    assert (outcome.queue_s, outcome.first_step_s) == (0.0025, 0.01)
    assert outcome.batch_share == 0.25


async def test_a_server_that_stalls_does_not_slow_the_client_down() -> None:
    """Coordinated omission: what waits behind the stall must be seen to wait."""
    free, lock = asyncio.Event(), asyncio.Lock()

    async def stalls(request: web.Request) -> web.Response:
        async with lock:
            await free.wait()
            return await response(request)

    arrivals = [0.01 * index for index in range(10)]
    async with served(stalls) as target, open_session(target) as session:
        asyncio.get_running_loop().call_later(0.5, free.set)
        outcomes = await send_open_loop(session, TRACE, arrivals, endless_patience(20))
    assert [outcome.index for outcome in outcomes] == list(range(10))
    assert max(outcome.lag_s for outcome in outcomes) < 0.4
    for outcome in outcomes:
        assert outcome.latency_s >= 0.5 - outcome.intended_s - 0.05


async def test_refusals_expiries_and_failures_are_told_apart() -> None:
    statuses = iter([429, 503, 504, 500])

    async def fails(request: web.Request) -> web.Response:
        return web.Response(status=next(statuses), text="why")

    async with served(fails) as target, open_session(target) as session:
        arrivals = [0.0, 0.1, 0.2, 0.3]
        outcomes = await send_open_loop(session, TRACE, arrivals, endless_patience(20))
    found = {outcome.http_status: outcome.status for outcome in outcomes}
    assert found == {
        429: Status.REFUSED,
        503: Status.REFUSED,
        504: Status.EXPIRED,
        500: Status.FAILED,
    }
    assert next(o for o in outcomes if o.http_status == 500).detail == "why"


async def test_nobody_listening_is_a_failure_and_no_exception() -> None:
    async with open_session(Target("http://127.0.0.1:9")) as session:
        (outcome,) = await send_open_loop(session, TRACE[:1], [0.0], endless_patience(1))
    assert outcome.status is Status.FAILED
    assert "Connect" in outcome.detail


async def test_clients_leave_when_they_have_had_enough() -> None:
    patience = replace(endless_patience(2, give_up_s=0.3), leave_s=(0.05, None))
    async with served(never) as target, open_session(target) as session:
        outcomes = await send_open_loop(session, TRACE, [0.0, 0.0], patience)
    assert [outcome.status for outcome in outcomes] == [Status.CANCELLED, Status.GIVEN_UP]
    assert outcomes[0].ended_s < outcomes[1].ended_s


async def test_a_hopeless_run_is_broken_off() -> None:
    async with served(never) as target, open_session(target) as session:
        outcomes = await asyncio.wait_for(
            send_open_loop(
                session, TRACE, [0.0] * 5, endless_patience(5), lambda ended, now_s: now_s > 0.2
            ),
            timeout=5,
        )
    assert outcomes == []


async def test_a_window_bounds_what_is_in_flight_and_sends_refused_again() -> None:
    now, most, refused = 0, 0, 0
    full = asyncio.Event()

    async def counts(request: web.Request) -> web.Response:
        nonlocal now, most, refused
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        await full.wait()
        now -= 1
        if refused < 2:
            refused += 1
            return web.Response(status=429)
        return await response(request)

    async with served(counts) as target, open_session(target) as session:
        outcomes = await send_windowed(session, TRACE, in_flight=3)
    assert most == 3
    assert {outcome.status for outcome in outcomes} == {Status.OK}
    assert [outcome.index for outcome in outcomes] == list(range(20))


async def test_deadlines_and_images_to_change_are_sent_where_asked() -> None:
    seen = []

    async def keeps(request: web.Request) -> web.Response:
        seen.append((request.path, await request.json()))
        return await response(request)

    edit = replace(TRACE[0], strength=0.5)
    patience = Patience(leave_s=(None, None), deadline_s=(1.5, None))
    async with served(keeps) as target, open_session(target) as session:
        await send_open_loop(session, [edit, TRACE[1]], arrivals_at(20, [1, 1]), patience)
    (edit_url, edit_body), (url, body) = seen
    assert (edit_url, url) == (EDITS, GENERATIONS)
    assert edit_body["deadline_s"] == 1.5
    assert edit_body["image"].startswith("data:image/png;base64,")
    assert not {"deadline_s", "image", "strength"} & set(body)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"not json", "not as expected"),
        (b'{"data": []}', "0 images"),
        (b'{"data": [{"b64_json": "AAAA"}]}', "no PNG"),
        (f'{{"data": [{{"b64_json": "{drawn_image("48x64")}"}}]}}'.encode(), "48x64"),
        (f'{{"data": [{{"b64_json": "{drawn_image()}"}}]}}'.encode(), ""),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_noticed(data: bytes, complaint: str) -> None:
    found = complaint_about(data, TRACE[0])
    assert complaint in found
    assert bool(found) == bool(complaint)


def test_servers_that_tell_nothing_are_no_trouble() -> None:
    assert read_server_timing("") == {}
    assert read_server_timing(TIMING)["total"] == 0.05
