"""The tracker between an event loop and an engine's threads, over a real runner's manners."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from stepserve.domain.errors import (
    CancelledError,
    GenerationFailedError,
    RequestIdInUseError,
    StoppedError,
)
from stepserve.domain.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings
from stepserve.ray_serve.replica.heartbeats import SILENT_AFTER_S
from stepserve.ray_serve.replica.request_tracker import RequestTracker


class ThreadedRunner:
    """Tells events from threads of its own, as an engine does."""

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


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def tracker(runner: ThreadedRunner) -> RequestTracker:
    return RequestTracker(cast(Any, runner), leaving_s=0)


async def accepted(
    tracker: RequestTracker, request: GenerationRequest, ingress: str = ""
) -> AsyncGenerator[Event, None]:
    """Submit a request, and return its events after the first one, which says it is accepted."""
    events = tracker.submit(request, ingress)
    assert isinstance(await asyncio.wait_for(anext(events), 5), Accepted)
    return events


async def rest(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


async def test_the_sender_hears_all_but_steps_in_order(
    tracker: RequestTracker, runner: ThreadedRunner
):
    events = await accepted(tracker, request())
    steps = [StepFinished("a", i, 50) for i in range(1, 51)]
    previews = [Preview("a", i, i, 50, ()) for i in range(50)]
    between = [event for pair in zip(steps, previews, strict=True) for event in pair]
    runner.tell(Started("a"), *between, finished())
    told = await rest(events)

    assert told == [*previews, finished()]
    assert runner.cancelled == []
    followed = await tracker.events(RequestKey("a"), 2, 0.0)
    assert followed is not None
    assert [numbered.event for numbered in followed] == [*between, finished()]


async def test_closing_the_events_cancels_the_request(
    tracker: RequestTracker, runner: ThreadedRunner
):
    events = await accepted(tracker, request())
    await events.aclose()

    assert runner.cancelled == [RequestKey("a")]


async def test_the_engine_is_asked_how_long_it_takes(
    tracker: RequestTracker, runner: ThreadedRunner
):
    events = await accepted(tracker, request())
    runner.tell(Started("a"))
    await asyncio.sleep(0)
    running = tracker.progress(RequestKey("a"))
    runner.tell(finished())
    await rest(events)
    ended = tracker.progress(RequestKey("a"))

    assert running is not None
    assert ended is not None
    assert (running.position, running.expected_s) == (2, 5.0)
    assert (ended.position, ended.expected_s) == (0, None)
    assert tracker.progress(RequestKey("b")) is None


async def test_an_event_wakes_those_who_wait(tracker: RequestTracker, runner: ThreadedRunner):
    _events = await accepted(tracker, request())
    waiting = asyncio.create_task(tracker.events(RequestKey("a"), 1, 30.0))
    await asyncio.sleep(0)
    runner.tell(Started("a"))
    news = await waiting

    assert news is not None
    assert [numbered.event for numbered in news] == [Started("a")]


async def test_without_an_event_the_wait_ends(tracker: RequestTracker):
    _events = await accepted(tracker, request())

    assert await tracker.events(RequestKey("a"), 1, 0.01) == []
    assert await tracker.events(RequestKey("unknown"), 0, 30.0) is None


async def test_cancelling_reaches_the_engine_while_a_request_is_in_flight(
    tracker: RequestTracker, runner: ThreadedRunner
):
    tracker.cancel(RequestKey("a"))
    events = await accepted(tracker, request())
    tracker.cancel(RequestKey("a"))
    runner.tell(Failed("a", CancelledError("gone")))
    await rest(events)
    tracker.cancel(RequestKey("a"))

    assert runner.cancelled == [RequestKey("a")]
    progress = tracker.progress(RequestKey("a"))
    assert progress is not None
    assert progress.state is RequestState.CANCELLED


async def test_a_client_that_left_may_come_again(tracker: RequestTracker, runner: ThreadedRunner):
    first = await accepted(tracker, request())
    [refused] = await rest(tracker.submit(request()))
    assert isinstance(refused, Failed)
    assert isinstance(refused.error, RequestIdInUseError)
    await first.aclose()
    again = asyncio.create_task(accepted(tracker, request()))
    await asyncio.sleep(0)
    runner.tell(Failed("a", CancelledError("gone")))
    events = await again
    runner.tell(finished())

    assert await rest(events) == [finished()]


async def test_a_request_of_another_owner_is_unknown_and_not_ended(
    tracker: RequestTracker, runner: ThreadedRunner
):
    _events = await accepted(tracker, request(owner="team-a"))

    assert tracker.progress(RequestKey("a", "team-b")) is None
    assert tracker.cancel(RequestKey("a", "team-b")) is None
    assert await tracker.events(RequestKey("a", "team-b"), 0, 30.0) is None
    assert runner.cancelled == []

    assert (
        tracker.cancel(RequestKey("a", "team-a"))
        == tracker.progress(RequestKey("a", "team-a"))
        is not None
    )
    assert runner.cancelled == [RequestKey("a", "team-a")]


async def test_one_that_the_runner_cannot_take_ends_and_its_id_is_free_again(
    tracker: RequestTracker, runner: ThreadedRunner
):
    runner.error = ValueError("a tokenizer's")
    [event] = await rest(tracker.submit(request()))
    assert isinstance(event, Failed)
    assert isinstance(event.error, GenerationFailedError)
    progress = tracker.progress(RequestKey("a"))
    assert progress is not None
    assert progress.state is RequestState.FAILED

    runner.error = None
    await accepted(tracker, request())


async def test_two_owners_work_under_one_id_and_neither_ends_or_hides_the_others(
    tracker: RequestTracker, runner: ThreadedRunner
):
    alice, bob = RequestKey("a", "alice"), RequestKey("a", "bob")
    events = {}
    sinks = {}
    for key in (alice, bob):
        events[key] = await accepted(tracker, request(owner=key.owner))
        sinks[key] = runner.sinks["a"]
    tracker.cancel(bob)
    sinks[bob](Failed("a", CancelledError("gone")))
    sinks[alice](finished())
    ends = {key: (await rest(of_one))[-1] for key, of_one in events.items()}
    states = {key: progress.state for key in events if (progress := tracker.progress(key))}

    assert runner.cancelled == [bob]
    assert (type(ends[alice]), type(ends[bob])) == (Finished, Failed)
    assert states == {alice: RequestState.FINISHED, bob: RequestState.CANCELLED}
    # An id that bob uses again hides nothing of alice's.
    _events = await accepted(tracker, request(owner="bob"))
    progress = tracker.progress(alice)
    assert progress is not None
    assert progress.state is RequestState.FINISHED


async def test_a_client_that_left_unnoticed_and_comes_again_at_once_waits_for_that_to_show(
    runner: ThreadedRunner,
):
    tracker = RequestTracker(cast(Any, runner), leaving_s=30)
    first = await accepted(tracker, request())
    again = asyncio.create_task(accepted(tracker, request()))
    await asyncio.sleep(0)
    await first.aclose()
    runner.tell(Failed("a", CancelledError("gone")))
    await again


async def test_requests_of_an_ingress_that_falls_silent_are_cancelled(runner: ThreadedRunner):
    clock = Clock()
    tracker = RequestTracker(cast(Any, runner), clock=clock)
    ingresses = {"a": "one", "b": "two", "c": "one", "d": ""}
    events = {i: await accepted(tracker, request(i), at) for i, at in ingresses.items()}
    runner.tell(Finished("c", (), Timings()))
    await rest(events["c"])
    clock.now_s += SILENT_AFTER_S - 1
    tracker.hear("two")
    tracker.cancel_orphans()
    assert runner.cancelled == []
    clock.now_s += 2
    tracker.cancel_orphans()
    tracker.cancel_orphans()
    assert runner.cancelled == [RequestKey("a")]
    runner.tell(Failed("a", CancelledError("cancelled")))
    [end] = await rest(events["a"])
    assert isinstance(end, Failed)
    assert isinstance(end.error, StoppedError)
    assert "lost contact with the ingress" in end.error.message


async def test_images_that_nobody_waits_for_are_not_kept(
    tracker: RequestTracker, runner: ThreadedRunner
):
    events = await accepted(tracker, request())
    await events.aclose()
    images = weakref.ref(end := finished())
    runner.tell(end)
    del end
    await asyncio.sleep(0)
    gc.collect()

    assert tracker.progress(RequestKey("a")) is not None
    assert images() is None


class Traces:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[RequestKey, Event | None]] = []

    def begin(self, request: GenerationRequest) -> None:
        self.heard.append((request.key, None))

    def add_event(self, key: RequestKey, event: Event) -> None:
        self.heard.append((key, event))


async def test_traces_hear_of_a_request_and_all_its_events(runner: ThreadedRunner):
    traces = Traces()
    tracker = RequestTracker(cast(Any, runner), cast(Any, traces))
    events = await accepted(tracker, request(owner="me"))
    runner.tell(Started("a"), StepFinished("a", 1, 20), finished())
    await rest(events)

    heard = [None, Accepted("a", 0, 1.0), Started("a"), StepFinished("a", 1, 20), finished()]
    assert traces.heard == [(RequestKey("a", "me"), event) for event in heard]


async def test_a_call_has_the_prompts_of_its_owner(tracker: RequestTracker):
    ids = [("a:0", "me"), ("a:1", "me"), ("a:2", "you"), ("ab:0", "me"), ("b", "me")]
    events = [await accepted(tracker, request(*names)) for names in ids]
    told = tracker.prompts(RequestKey("a", "me"))

    assert [progress.request_id for progress in told] == ["a:0", "a:1"]
    assert {(progress.position, progress.expected_s) for progress in told} == {(2, 5.0)}
    assert tracker.prompts(RequestKey("b", "me")) == []
    for one in events:
        await one.aclose()
