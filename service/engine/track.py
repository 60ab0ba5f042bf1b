"""A request being worked on: a greenlet that runs an ordinary pipeline call and parks in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import greenlet

from service.domain.errors import CancelledError, GenerationFailedError, StepserveError
from service.domain.states import RequestState, move
from service.domain.timings import Timings
from service.engine.call import Call


class Stage(StrEnum):
    """What a module is for, so that timings can be told apart."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"


class Listener(Protocol):
    """Hears what becomes of a piece of work. Called on the engine thread: must return quickly."""

    def started(self) -> None:
        """The pipeline call begins."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The pipeline call returned `result`."""

    def failed(self, error: BaseException, timings: Timings) -> None:
        """The work was cancelled or raised."""


@dataclass(frozen=True, eq=False)
class Work:
    """What the engine is asked to do.

    Args:
        id: unique among the work in hand.
        rows: rows that each denoiser call will take.
        steps: denoiser calls expected, for estimates.
        pictures: pictures it makes, counted against the limit on waiting work.
        run: the pipeline call; it runs in a greenlet on the engine thread.
        listener: hears the end, exactly once.
    """

    id: str
    rows: int
    steps: int
    pictures: int
    run: Callable[[], Any]
    listener: Listener


@dataclass
class Clockwork:
    """Seconds a track spent in each stage, and the row shares of its denoiser forwards."""

    submitted_s: float
    started_s: float | None = None
    stage_s: dict[Stage, float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def timings(self, now_s: float) -> Timings:
        """What to tell about the track at this moment."""
        return Timings(
            queue_s=(now_s if self.started_s is None else self.started_s) - self.submitted_s,
            encode_s=self.stage_s.get(Stage.ENCODE, 0.0),
            denoise_s=self.stage_s.get(Stage.DENOISE, 0.0),
            decode_s=self.stage_s.get(Stage.DECODE, 0.0),
            total_s=now_s - self.submitted_s,
            batch_share=sum(self.shares) / len(self.shares) if self.shares else 1.0,
        )


class TrackGreenlet(greenlet.greenlet):  # type: ignore[misc]
    """A greenlet that knows its track, so that a parkable module finds it."""

    track: Track


class Track:
    """One piece of work between its submission and its end.

    The engine resumes it with the outputs of module calls; it runs on until its next call, which
    is then in `call`, or until it ends.
    """

    def __init__(self, work: Work, now_s: float) -> None:
        self.work = work
        self.state = RequestState.QUEUED
        self.clockwork = Clockwork(submitted_s=now_s)
        self.call: Call | None = None
        self.parked_s = 0.0
        self.steps_done = 0
        # Made on start: a greenlet belongs to the thread that makes it, which must be the engine's.
        self._greenlet: TrackGreenlet | None = None

    @property
    def steps_left(self) -> int:
        """Denoiser calls still expected."""
        return max(self.work.steps - self.steps_done, 0)

    def start(self, now_s: float) -> None:
        """Run up to the first module call."""
        self.state = move(self.state, RequestState.RUNNING)
        self.clockwork.started_s = now_s
        self.work.listener.started()
        self._greenlet = TrackGreenlet(self.work.run)
        self._greenlet.track = self
        self._run(self._greenlet.switch, now_s)

    def resume(self, output: Any, now_s: float) -> None:
        """Give the parked call its output and run up to the next one."""
        assert self._greenlet is not None
        self._run(partial(self._greenlet.switch, output), now_s)

    def throw(self, error: BaseException, now_s: float) -> None:
        """Raise `error` from the parked call, or end a track that never started."""
        if self._greenlet is None:
            self._fail(error, now_s)
        else:
            self._run(partial(self._greenlet.throw, error), now_s)

    def park(self, call: Call) -> Any:
        """Called inside the greenlet: hand `call` to the engine and wait for its output."""
        self.call = call
        assert self._greenlet is not None
        return self._greenlet.parent.switch()

    def _run(self, switch: Callable[[], Any], now_s: float) -> None:
        self.call = None
        try:
            result = switch()
        except BaseException as error:
            # Whatever a pipeline raises ends its own track and nothing else.
            self._fail(error, now_s)
            return
        if self.call is None:
            self.state = move(self.state, RequestState.FINISHED)
            self.work.listener.finished(result, self.clockwork.timings(now_s))
        else:
            self.parked_s = now_s

    def _fail(self, error: BaseException, now_s: float) -> None:
        cancelled = isinstance(error, CancelledError | greenlet.GreenletExit)
        self.state = move(self.state, RequestState.CANCELLED if cancelled else RequestState.FAILED)
        self.work.listener.failed(error, self.clockwork.timings(now_s))


def as_stepserve_error(error: BaseException, request_id: str) -> StepserveError:
    """Any exception as one of our own, naming the request."""
    if isinstance(error, StepserveError):
        return error
    kind = type(error).__name__
    return GenerationFailedError(f"request {request_id} failed: {kind}: {error}")
