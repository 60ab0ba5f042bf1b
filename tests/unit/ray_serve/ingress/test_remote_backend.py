"""What the ingress asks of replicas on behalf of those who follow requests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from stepserve.domain.events import Started
from stepserve.domain.progress import Progress
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.ray_serve.ingress.remote_backend import RemoteBackend


class Replicas:
    """Answers for all replicas, once it is let."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.may_answer = asyncio.Event()
        self.fails = False

    async def ask(self, method: str, *arguments: Any, slack_s: float = 0.0) -> list[Any]:
        self.asked.append((method, *arguments))
        await self.may_answer.wait()
        if self.fails:
            raise ConnectionError
        key, number, _ = arguments
        return [None, [NumberedEvent(number, Started(key.id))]]


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def backend(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> RemoteBackend:
    backend = RemoteBackend(lambda _: None, {})
    monkeypatch.setattr(backend, "_ask_all", replicas.ask)
    return backend


def follow(backend: RemoteBackend, number: int = 3, owner: str = "me") -> asyncio.Task[Any]:
    return asyncio.create_task(backend.events(RequestKey("a", owner), number, 2.0))


async def test_those_who_follow_together_ask_once(backend: RemoteBackend, replicas: Replicas):
    following = [follow(backend) for _ in range(400)]
    await asyncio.sleep(0)
    replicas.may_answer.set()
    told = await asyncio.gather(*following)

    assert replicas.asked == [("events", RequestKey("a", "me"), 3, 2.0)]
    assert told == [[NumberedEvent(3, Started("a"))]] * 400


async def test_others_ask_for_themselves(backend: RemoteBackend, replicas: Replicas):
    replicas.may_answer.set()

    await asyncio.gather(follow(backend), follow(backend, number=4), follow(backend, owner="you"))
    await follow(backend)

    assert len(replicas.asked) == 4


async def test_who_leaves_takes_nothing_from_the_others(backend: RemoteBackend, replicas: Replicas):
    first, second = follow(backend), follow(backend)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    replicas.may_answer.set()

    assert await second == [NumberedEvent(3, Started("a"))]
    assert first.cancelled()


async def test_what_fails_fails_for_all(backend: RemoteBackend, replicas: Replicas):
    replicas.fails = True
    replicas.may_answer.set()

    told = await asyncio.gather(follow(backend), follow(backend), return_exceptions=True)

    assert [type(error) for error in told] == [ConnectionError, ConnectionError]


async def test_prompts_of_a_call_are_found_on_all_replicas_and_those_in_flight_first(
    backend: RemoteBackend, monkeypatch: pytest.MonkeyPatch
):
    first, second = (Progress(f"a:{i}", "emoji", "me", 5) for i in range(2))
    lost = replace(first, state=RequestState.FAILED)

    async def ask(method: str, call: RequestKey) -> list[Any]:
        assert (method, call) == ("prompts", RequestKey("a", "me"))
        return [[lost], [second, first], []]

    monkeypatch.setattr(backend, "_ask_all", ask)

    assert await backend.prompts(RequestKey("a", "me")) == [first, second]
