from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from api_fakes import Blocking, FakeBackend, make_app
from starlette.types import Receive
from stepserve.api.errors import RequestTimedOutError
from stepserve.api.http import connection
from stepserve.api.http.connection import while_connected
from stepserve.domain.errors import CancelledError

URL = "/v1/images/generations"
BODY = json.dumps({"prompt": "cat"}).encode()


async def connected_for_ever() -> Any:
    await asyncio.Event().wait()


async def disconnected() -> Any:
    return {"type": "http.disconnect"}


async def outcome(
    receive: Receive, work: Callable[[], Coroutine[Any, Any, Any]], timeout_s: float = 5
) -> Any:
    """What `work` returns, if the client stays."""

    async def items() -> AsyncGenerator[Any, None]:
        yield await work()

    [result] = [item async for item in while_connected(receive, items(), timeout_s)]
    return result


class Peer:
    """One ASGI connection under test: sends the body, then leaves when told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.sent: list[Any] = []
        self._body = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def post_scope() -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    common = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": b""}
    return common | {"method": "POST", "path": URL, "root_path": "", "headers": headers}


async def begin(backend: FakeBackend, peer: Peer) -> asyncio.Task[None]:
    """Start a request as a server would, and return once the backend works on it."""
    app = make_app(backend)
    task = asyncio.create_task(app(post_scope(), peer.receive, peer.send))
    while not backend.requests:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_disconnect_cancels_the_work(backend: FakeBackend):
    blocking = Blocking()
    backend.generate_with(blocking)
    peer = Peer()
    task = await begin(backend, peer)
    peer.leaves.set()
    await asyncio.wait_for(task, 5)

    assert blocking.cancelled.is_set()
    assert peer.sent[0]["status"] == 499


async def test_cancelling_the_handler_cancels_the_work(backend: FakeBackend):
    blocking = Blocking()
    backend.generate_with(blocking)
    peer = Peer()
    task = await begin(backend, peer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)

    assert blocking.cancelled.is_set()
    assert peer.sent == []


async def test_no_task_is_left_behind(backend: FakeBackend):
    peer = Peer()
    await (await begin(backend, peer))

    assert peer.sent[0]["status"] == 200
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_leaving_during_the_upload_is_answered_to_nobody(backend: FakeBackend):
    peer = Peer()
    app = make_app(backend)
    await app(post_scope(), disconnected, peer.send)

    assert peer.sent == []
    assert backend.requests == []


def test_closing_a_real_connection_cancels_the_work(backend: FakeBackend, server_port: int):
    blocking = Blocking()
    backend.generate_with(blocking)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server_port)) as client:
        client.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
        assert blocking.began.wait(10)
        assert not blocking.cancelled.is_set()

    assert blocking.cancelled.wait(10)


async def test_result_and_error_of_the_work_pass_through():
    async def number() -> int:
        return 4

    async def broken() -> int:
        raise KeyError("x")

    assert await outcome(connected_for_ever, number) == 4
    with pytest.raises(KeyError):
        await outcome(connected_for_ever, broken)


async def test_work_cancelled_from_elsewhere_is_an_error_not_a_cancellation():
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CancelledError):
        await outcome(connected_for_ever, cancelled)


async def test_a_connection_that_fails_counts_as_gone():
    async def broken() -> Any:
        raise ConnectionError

    with pytest.raises(CancelledError):
        await outcome(broken, connected_for_ever)


async def test_messages_before_the_disconnect_do_not_count():
    messages = iter(["http.request", "http.request", "http.disconnect"])

    async def receive() -> Any:
        return {"type": next(messages)}

    with pytest.raises(CancelledError):
        await outcome(receive, connected_for_ever)
    assert list(messages) == []


async def test_work_that_ignores_its_cancellation_does_not_hold_the_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(connection, "CANCEL_GRACE_S", 0.01)
    reports: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
    release = asyncio.Event()
    ended = asyncio.Event()

    async def stubborn() -> None:
        try:
            await release.wait()
        except asyncio.CancelledError:
            await release.wait()
        ended.set()
        raise ValueError("late, and nobody's business")

    with pytest.raises(RequestTimedOutError):
        await outcome(connected_for_ever, stubborn, 0.01)
    assert not ended.is_set()
    release.set()
    await asyncio.wait_for(ended.wait(), 5)
    await asyncio.sleep(0)
    gc.collect()
    assert reports == []
