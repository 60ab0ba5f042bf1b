"""The progress of one request, as its events show it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepserve.domain.errors import CancelledError, ExpiredError, StepserveError, StoppedError
from stepserve.domain.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState, is_terminal
from stepserve.domain.timings import Timings


@dataclass(frozen=True)
class Progress:
    """A request's state, and how far it is. It came at Unix time `created`, in seconds.

    `position` requests were accepted before it and still run. `expected_s` is when it should be
    finished, in seconds from now; None where that is unknown, or it has ended.
    """

    request_id: str
    model: str
    owner: str
    created: int
    state: RequestState = RequestState.QUEUED
    position: int = 0
    step: int = 0
    steps: int = 0
    expected_s: float | None = None
    error: StepserveError | None = None
    timings: Timings | None = None

    @property
    def key(self) -> RequestKey:
        """Of the request."""
        return RequestKey(self.request_id, self.owner)

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return is_terminal(self.state)


def advance(progress: Progress, event: Event) -> Progress:
    """`progress` after `event`."""
    match event:
        case Accepted(position=position, expected_s=expected_s):
            return replace(progress, position=position, expected_s=expected_s)
        case Started():
            return replace(progress, state=RequestState.RUNNING, position=0)
        case StepFinished(step=step, steps=steps):
            return replace(progress, step=step, steps=steps)
        case Preview():
            return progress
        case Finished(timings=timings):
            ended = replace(progress, step=progress.steps, timings=timings)
            return _end(ended, RequestState.FINISHED)
        case Failed(error=error):
            return _end(replace(progress, error=error), _state_of(error))


def _end(progress: Progress, state: RequestState) -> Progress:
    return replace(progress, state=state, position=0, expected_s=None)


def _state_of(error: StepserveError) -> RequestState:
    if isinstance(error, CancelledError | StoppedError):
        return RequestState.CANCELLED
    return RequestState.EXPIRED if isinstance(error, ExpiredError) else RequestState.FAILED
