"""The progress of one request, as its events show it."""

from __future__ import annotations

from collections.abc import Sequence
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


def progress_of_call(key: RequestKey, prompts: Sequence[Progress]) -> Progress:
    """Where a call with several prompts stands, by where the request for each prompt stands.

    It has all of their steps, is finished once at least one of them is and none is in flight, and
    is expected to be when the last one is.
    """
    in_flight = [prompt for prompt in prompts if not prompt.ended]
    expected_s = [prompt.expected_s for prompt in in_flight]
    states = [prompt.state for prompt in prompts]
    state = _state_of_call(states)
    return Progress(
        request_id=key.id,
        model=prompts[0].model,
        owner=key.owner,
        created=min(prompt.created for prompt in prompts),
        state=state,
        position=min((prompt.position for prompt in in_flight), default=0),
        step=sum(prompt.step for prompt in prompts),
        steps=sum(prompt.steps for prompt in prompts),
        expected_s=max((s for s in expected_s if s is not None), default=None),
        error=None if RequestState.FINISHED in states or in_flight else prompts[0].error,
    )


def _state_of_call(states: Sequence[RequestState]) -> RequestState:
    if all(state is RequestState.QUEUED for state in states):
        return RequestState.QUEUED
    if not all(map(is_terminal, states)):
        return RequestState.RUNNING
    return RequestState.FINISHED if RequestState.FINISHED in states else states[0]


def _end(progress: Progress, state: RequestState) -> Progress:
    return replace(progress, state=state, position=0, expected_s=None)


def _state_of(error: StepserveError) -> RequestState:
    if isinstance(error, CancelledError | StoppedError):
        return RequestState.CANCELLED
    return RequestState.EXPIRED if isinstance(error, ExpiredError) else RequestState.FAILED
