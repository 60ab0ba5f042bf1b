"""What a client hears of a request that loses its replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from stepserve.domain.errors import (
    ExpiredError,
    GenerationFailedError,
    NotReadyError,
    ServerFullError,
    StoppedError,
)
from stepserve.domain.events import Accepted, Event, Failed, Finished, Preview
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.timings import Timings
from stepserve.ray_serve.ingress import retries
from stepserve.ray_serve.ingress.retries import MOST_TRIES, with_retries

REQUEST = GenerationRequest("r", "emoji", "pizza", 64, 64, 4, 4.0, 1, "DDIMScheduler")
FINISHED = Finished("r", (), Timings())


def events_up_to(previews: int) -> list[Event]:
    return [Accepted("r", 0, 1.0), *(Preview("r", i, i + 1, 4, ()) for i in range(previews))]


class Replicas:
    """Each try gets the next script: events, then an error or the end."""

    def __init__(self, *scripts: tuple[list[Event], BaseException | None]) -> None:
        self.scripts = list(scripts)
        self.requests: list[GenerationRequest] = []
        self.closed = 0
        self.retried: list[str] = []

    @asynccontextmanager
    async def __call__(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        events, error = self.scripts[len(self.requests)]
        self.requests.append(request)
        try:
            yield played(events, error)
        finally:
            self.closed += 1


async def played(events: list[Event], error: BaseException | None) -> AsyncIterator[Event]:
    for event in events:
        yield event
    if error is not None:
        raise error


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSE_S", 0.0)


async def told(
    replicas: Replicas,
    request: GenerationRequest = REQUEST,
    clock: Callable[[], float] = lambda: 0.0,
) -> list[Event]:
    events = with_retries(request, replicas, replicas.retried.append, clock)
    return [event async for event in events]


async def test_another_replica_serves_and_nothing_is_told_twice() -> None:
    replicas = Replicas((events_up_to(1), ActorDiedError()), ([*events_up_to(2), FINISHED], None))
    assert await told(replicas) == [*events_up_to(2), FINISHED]
    assert replicas.requests == [REQUEST, REQUEST]
    assert replicas.retried == ["emoji"]


@pytest.mark.parametrize("error", [StoppedError("stops"), NotReadyError("draining", 1.0)])
async def test_a_replica_that_stops_is_no_end(error: StoppedError | NotReadyError) -> None:
    replicas = Replicas(([Failed("r", error)], None), ([FINISHED], None))
    assert await told(replicas) == [FINISHED]


async def test_it_does_not_go_round_for_ever() -> None:
    replicas = Replicas(*[([], ActorDiedError())] * MOST_TRIES)
    with pytest.raises(NotReadyError, match="lost the replica"):
        await told(replicas)
    assert replicas.closed == MOST_TRIES


async def test_the_last_refusal_is_told_as_it_was() -> None:
    refusal: list[Event] = [Failed("r", StoppedError("stops"))]
    replicas = Replicas(*[(refusal, None)] * MOST_TRIES)
    with pytest.raises(StoppedError, match="stops"):
        await told(replicas)


@pytest.mark.parametrize(
    "error", [GenerationFailedError("broken"), ServerFullError("full", 1.0), ExpiredError("late")]
)
async def test_what_another_replica_would_not_mend_is_the_answer(
    error: GenerationFailedError,
) -> None:
    replicas = Replicas(([Failed("r", error)], None))
    assert await told(replicas) == [Failed("r", error)]
    assert replicas.retried == []


async def test_an_error_in_our_own_code_is_not_tried_again() -> None:
    replicas = Replicas(([], RayTaskError("f", "trace", ValueError("ours"))))
    with pytest.raises(RayTaskError, match="trace"):
        await told(replicas)
    assert len(replicas.requests) == 1


async def test_a_full_queue_of_ray_serve_is_told_as_full() -> None:
    replicas = Replicas(([], BackPressureError(1, 1)))
    with pytest.raises(ServerFullError):
        await told(replicas)


async def test_a_deadline_counts_from_the_first_try() -> None:
    times = iter([0.0, 3.0, 3.0, 9.0])
    replicas = Replicas(*[([], ActorDiedError())] * 3)
    request = replace(REQUEST, deadline_s=8.0)
    with pytest.raises(ExpiredError):
        await told(replicas, request, lambda: next(times))
    assert [r.deadline_s for r in replicas.requests] == [8.0, 5.0]


async def test_closing_ends_the_try() -> None:
    replicas = Replicas((events_up_to(4), None))
    events = with_retries(REQUEST, replicas, replicas.retried.append)
    await anext(events)
    await events.aclose()
    assert replicas.closed == 1


async def test_cancelling_ends_the_try_and_is_not_tried_again() -> None:
    replicas = Replicas(([Accepted("r", 0, 1.0)], asyncio.CancelledError()))
    with pytest.raises(asyncio.CancelledError):
        await told(replicas)
    assert len(replicas.requests) == 1


async def test_what_is_left_of_a_deadline_is_no_fault_of_the_caller() -> None:
    """Less than may be asked for has expired; a replica would call it a wrong value."""
    times = iter([0.0, 7.9995])
    replicas = Replicas(*[([], ActorDiedError())] * 3)
    request = replace(REQUEST, deadline_s=8.0)
    with pytest.raises(ExpiredError):
        await told(replicas, request, lambda: next(times))
    assert len(replicas.requests) == 1
