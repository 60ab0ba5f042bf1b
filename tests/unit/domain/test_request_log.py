"""What is remembered of requests, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.errors import (
    CancelledError,
    ExpiredError,
    GenerationFailedError,
    RequestIdInUseError,
    StoppedError,
)
from stepserve.domain.events import (
    Accepted,
    EncodedImage,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.request_log import MOST_REPLAYABLE, RequestLog
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.states import RequestState, is_terminal
from stepserve.domain.timings import Timings


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def request(request_id: str = "a", owner: str = "") -> GenerationRequest:
    return GenerationRequest(request_id, "emoji", "cat", 64, 64, 20, 4.0, 0, "ddim", owner=owner)


def preview(size_bytes: int, request_id: str = "a") -> Preview:
    return Preview(request_id, 0, 1, 20, (EncodedImage(b"x" * size_bytes, "image/png", 0),))


def finished(request_id: str = "a") -> Finished:
    return Finished(request_id, (EncodedImage(b"png", "image/png", 5),), Timings())


def add(log: RequestLog, event: Event, owner: str = "") -> None:
    log.add(RequestKey(event.request_id, owner), event)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> RequestLog:
    return RequestLog(clock, lambda: 1.8e9, previews_bytes=100, most_ended=60)


def state_of(log: RequestLog, request_id: str = "a") -> RequestState:
    progress = log.progress(RequestKey(request_id))
    assert progress is not None
    return progress.state


def test_a_life_is_followed(log: RequestLog, clock: Clock):
    log.open(request(owner="team"))
    add(log, Accepted("a", 4, 10.0), "team")
    clock.now_s += 3
    told = log.progress(RequestKey("a", "team"))
    assert told is not None
    assert (told.position, told.expected_s, told.owner, told.created) == (4, 7.0, "team", 1.8e9)
    add(log, Started("a"), "team")
    add(log, StepFinished("a", 7, 20), "team")
    told = log.progress(RequestKey("a", "team"))
    assert told is not None
    assert (told.state, told.position, told.step) == (RequestState.RUNNING, 0, 7)
    add(log, finished(), "team")
    told = log.progress(RequestKey("a", "team"))
    assert told is not None
    assert (told.state, told.step, told.expected_s) == (RequestState.FINISHED, 20, None)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (CancelledError("x"), RequestState.CANCELLED),
        (StoppedError("x"), RequestState.CANCELLED),
        (ExpiredError("x"), RequestState.EXPIRED),
        (GenerationFailedError("x"), RequestState.FAILED),
    ],
)
def test_ends_have_names(log: RequestLog, error: Exception, state: RequestState):
    log.open(request())
    add(log, Failed("a", error))  # type: ignore[arg-type]
    add(log, finished())

    assert state_of(log) is state


def test_an_id_is_free_again_when_its_request_has_ended(log: RequestLog):
    log.open(request())
    with pytest.raises(RequestIdInUseError, match="'a'"):
        log.open(request())
    add(log, finished())
    log.open(request())

    assert state_of(log) is RequestState.QUEUED


def test_images_are_not_kept(log: RequestLog):
    log.open(request())
    add(log, finished())

    [numbered] = log.events_since(RequestKey("a"), 0) or []
    assert isinstance(numbered.event, Finished)
    assert [(image.data, image.seed) for image in numbered.event.images] == [(b"", 5)]


def test_old_previews_make_room_for_new_ones(log: RequestLog):
    log.open(request("a"))
    log.open(request("b"))
    add(log, preview(60, "a"))
    add(log, preview(60, "b"))

    [first] = log.events_since(RequestKey("a"), 0) or []
    [second] = log.events_since(RequestKey("b"), 0) or []
    assert isinstance(first.event, Preview)
    assert isinstance(second.event, Preview)
    assert first.event.images == ()
    assert len(second.event.images[0].data) == 60


def test_of_long_ended_requests_less_and_less_is_remembered(log: RequestLog):
    for index in range(100):
        name = f"r{index}"
        log.open(request(name))
        add(log, StepFinished(name, 1, 20))
        add(log, finished(name))

    assert log.progress(RequestKey("r39")) is None
    assert len(log.events_since(RequestKey("r40"), 0) or []) == 1
    assert len(log.events_since(RequestKey(f"r{100 - MOST_REPLAYABLE}"), 0) or []) == 2
    assert [e.number for e in log.events_since(RequestKey("r40"), 0) or []] == [1]


def test_a_reused_id_outlives_its_first_request(log: RequestLog):
    log.open(request("a"))
    add(log, finished("a"))
    log.open(request("a"))
    for index in range(61):
        log.open(request(f"r{index}"))
        add(log, finished(f"r{index}"))

    assert state_of(log) is RequestState.QUEUED


EVENTS = st.sampled_from(
    [
        Accepted("a", 1, 2.0),
        Started("a"),
        StepFinished("a", 1, 20),
        preview(30),
        finished(),
        Failed("a", CancelledError("x")),
        StepFinished("unknown", 1, 2),
    ]
)


@given(st.lists(EVENTS, max_size=30))
def test_numbers_go_up_by_one_and_nothing_follows_an_end(events: list[Event]):
    log = RequestLog(Clock(), lambda: 0.0, previews_bytes=100)
    log.open(request())
    for event in events:
        add(log, event)

    told = log.events_since(RequestKey("a"), 0) or []
    assert [numbered.number for numbered in told] == list(range(len(told)))
    ends = [n.number for n in told if isinstance(n.event, Finished | Failed)]
    assert ends in ([], [len(told) - 1])
    assert is_terminal(state_of(log)) == bool(ends)
    assert [n.number for n in log.events_since(RequestKey("a"), 2) or []] == list(
        range(2, len(told))
    )


def test_two_owners_may_use_one_id_at_the_same_time(log: RequestLog):
    log.open(request(owner="alice"))
    log.open(request(owner="bob"))
    add(log, Started("a"), "alice")
    add(log, Failed("a", CancelledError("gone")), "bob")

    alice, bob = (log.progress(RequestKey("a", owner)) for owner in ("alice", "bob"))
    assert alice is not None
    assert bob is not None
    assert (alice.state, bob.state) == (RequestState.RUNNING, RequestState.CANCELLED)
    assert [e.event for e in log.events_since(RequestKey("a", "alice"), 0) or []] == [Started("a")]
    assert log.progress(RequestKey("a", "carol")) is None
    with pytest.raises(RequestIdInUseError):
        log.open(request(owner="alice"))
