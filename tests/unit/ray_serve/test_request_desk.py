"""The desk between an event loop and an engine's threads, over a real runner's manners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from stepserve.domain.errors import CancelledError, GenerationFailedError, RequestIdInUseError
from stepserve.domain.events import Accepted, Event, Failed, Finished, Started, StepFinished
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings
from stepserve.ray_serve.replica.request_tracker import RequestTracker


class ThreadedRunner:
    """Tells events from threads of its own, as an engine does."""

    guidance = CLASSIC

    def __init__(self) -> None:
        self.sinks: dict[str, Callable[[Event], None]] = {}
        self.cancelled: list[RequestKey] = []
        self.error: Exception | None = None

    def submit(self, request: GenerationRequest, sink: Callable[[Event], None]) -> None:
        if self.error is not None:
            raise self.error
        self.sinks[request.id] = sink
        sink(Accepted(request.id, 0, 1.0))

    def cancel(self, key: RequestKey) -> None:
        self.cancelled.append(key)

    def estimator_of(self, key: RequestKey) -> tuple[int, float] | None:
        return (2, 5.0)

    def tell(self, *events: Event) -> None:
        def run() -> None:
            for event in events:
                self.sinks[event.request_id](event)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


def request(request_id: str = "a", owner: str = "") -> GenerationRequest:
    made = GenerationRequest(request_id, "emoji", "cat", 64, 64, 20, 4.0, 0, "ddim")
    return replace(made, owner=owner)


def finished() -> Finished:
    return Finished("a", (), Timings())


@pytest.fixture
def runner() -> ThreadedRunner:
    return ThreadedRunner()


@pytest.fixture
def desk(runner: ThreadedRunner) -> RequestTracker:
    return RequestTracker(cast(Any, runner), leaving_s=0)


async def test_events_arrive_in_order(desk: RequestTracker, runner: ThreadedRunner):
    queue = await desk.submit(request())
    runner.tell(Started("a"), *(StepFinished("a", i, 50) for i in range(1, 51)), finished())
    told = [await queue.get() for _ in range(53)]

    assert [e.step for e in told if isinstance(e, StepFinished)] == list(range(1, 51))
    assert isinstance(told[0], Accepted)
    assert isinstance(told[-1], Finished)


async def test_the_engine_is_asked_how_long_it_takes(desk: RequestTracker, runner: ThreadedRunner):
    await desk.submit(request())
    runner.tell(Started("a"))
    await asyncio.sleep(0)
    running = desk.progress(RequestKey("a"))
    runner.tell(finished())
    await asyncio.sleep(0)
    ended = desk.progress(RequestKey("a"))

    assert running is not None
    assert ended is not None
    assert (running.position, running.expected_s) == (2, 5.0)
    assert (ended.position, ended.expected_s) == (0, None)
    assert desk.progress(RequestKey("b")) is None


async def test_news_wakes_those_who_wait(desk: RequestTracker, runner: ThreadedRunner):
    await desk.submit(request())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(desk.events(RequestKey("a"), 1, 30.0))
    await asyncio.sleep(0)
    runner.tell(Started("a"))
    news = await waiting

    assert news is not None
    assert [numbered.event for numbered in news] == [Started("a")]


async def test_without_news_the_wait_ends(desk: RequestTracker):
    await desk.submit(request())
    await asyncio.sleep(0)

    assert await desk.events(RequestKey("a"), 1, 0.01) == []
    assert await desk.events(RequestKey("unknown"), 0, 30.0) is None


async def test_giving_up_reaches_the_engine_once_it_is_at_work(
    desk: RequestTracker, runner: ThreadedRunner
):
    desk.give_up(RequestKey("a"))
    await desk.submit(request())
    desk.give_up(RequestKey("a"))
    runner.tell(Failed("a", CancelledError("gone")))
    await asyncio.sleep(0)
    desk.give_up(RequestKey("a"))

    assert runner.cancelled == [RequestKey("a")]
    progress = desk.progress(RequestKey("a"))
    assert progress is not None
    assert progress.state is RequestState.CANCELLED


async def test_a_client_that_left_may_come_again(desk: RequestTracker, runner: ThreadedRunner):
    await desk.submit(request())
    with pytest.raises(RequestIdInUseError):
        await desk.submit(request())
    desk.give_up(RequestKey("a"))
    again = asyncio.create_task(desk.submit(request()))
    await asyncio.sleep(0)
    runner.tell(Failed("a", CancelledError("gone")))
    queue = await again
    runner.tell(finished())

    assert [type(await queue.get()) for _ in range(2)] == [Accepted, Finished]


async def test_a_request_of_another_owner_is_unknown_and_not_ended(
    desk: RequestTracker, runner: ThreadedRunner
):
    await desk.submit(request(owner="team-a"))
    await asyncio.sleep(0)

    assert desk.progress(RequestKey("a", "team-b")) is None
    assert desk.cancel(RequestKey("a", "team-b")) is None
    assert await desk.events(RequestKey("a", "team-b"), 0, 30.0) is None
    assert runner.cancelled == []

    assert (
        desk.cancel(RequestKey("a", "team-a"))
        == desk.progress(RequestKey("a", "team-a"))
        is not None
    )
    assert runner.cancelled == [RequestKey("a", "team-a")]


async def test_one_that_the_runner_cannot_take_ends_and_its_id_is_free_again(
    desk: RequestTracker, runner: ThreadedRunner
):
    runner.error = ValueError("a tokenizer's")
    queue = await desk.submit(request())
    event = await asyncio.wait_for(queue.get(), 5)
    assert isinstance(event, Failed)
    assert isinstance(event.error, GenerationFailedError)
    progress = desk.progress(RequestKey("a"))
    assert progress is not None
    assert progress.state is RequestState.FAILED

    runner.error = None
    again = await desk.submit(request())
    assert isinstance(await again.get(), Accepted)


async def test_two_owners_work_under_one_id_and_neither_ends_or_hides_the_others(
    desk: RequestTracker, runner: ThreadedRunner
):
    alice, bob = RequestKey("a", "alice"), RequestKey("a", "bob")
    queues = {}
    sinks = {}
    for key in (alice, bob):
        queues[key] = await desk.submit(request(owner=key.owner))
        sinks[key] = runner.sinks["a"]
    desk.give_up(bob)
    sinks[bob](Failed("a", CancelledError("gone")))
    sinks[alice](finished())
    ends = {key: [await queue.get() for _ in range(2)][-1] for key, queue in queues.items()}
    states = {key: progress.state for key in queues if (progress := desk.progress(key))}

    assert runner.cancelled == [bob]
    assert (type(ends[alice]), type(ends[bob])) == (Finished, Failed)
    assert states == {alice: RequestState.FINISHED, bob: RequestState.CANCELLED}
    # An id that bob uses again hides nothing of alice's.
    await desk.submit(request(owner="bob"))
    progress = desk.progress(alice)
    assert progress is not None
    assert progress.state is RequestState.FINISHED


async def test_a_client_that_left_unnoticed_and_comes_again_at_once_waits_for_that_to_show(
    runner: ThreadedRunner,
):
    desk = RequestTracker(cast(Any, runner), leaving_s=30)
    await desk.submit(request())
    again = asyncio.create_task(desk.submit(request()))
    await asyncio.sleep(0)
    desk.give_up(RequestKey("a"))
    runner.tell(Failed("a", CancelledError("gone")))
    queue = await asyncio.wait_for(again, 5)

    assert isinstance(await queue.get(), Accepted)
