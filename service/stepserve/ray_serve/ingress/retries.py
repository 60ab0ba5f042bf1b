"""Requests whose replica was lost are served by another one: same seed, same images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, RayServeException

from stepserve.domain.errors import (
    ExpiredError,
    NotReadyError,
    ServerFullError,
    StepserveError,
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
from stepserve.domain.limits import MIN_DEADLINE_S
from stepserve.domain.requests import GenerationRequest

logger = logging.getLogger("ray.serve")

# One that brings down every replica it meets must not go round for ever.
MOST_TRIES = 3
PAUSE_S = 0.1
RETRY_AFTER_S = 3.0
# The process or its node is gone. What a replica raised itself is none of them.
LOST = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
)
# It stops, or is about to: another replica may serve.
ENDED_BY_REPLICA = (StoppedError, NotReadyError)

Try = Callable[[GenerationRequest], AsyncGenerator[Event, None]]


class LostError(Exception):
    """This try brought nothing; `error` is what to say if it was the last one."""

    def __init__(self, error: StepserveError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Told:
    """How much of a request its client has heard: another try starts from the beginning."""

    accepted: bool = False
    started: bool = False
    step: int = 0
    preview: int = -1

    def is_new(self, event: Event) -> bool:
        """Whether an event tells something new; notes it if so."""
        match event:
            case Accepted():
                fresh, self.accepted = not self.accepted, True
            case Started():
                fresh, self.started = not self.started, True
            case StepFinished(step=step):
                fresh, self.step = step > self.step, max(self.step, step)
            case Preview(index=index):
                fresh, self.preview = index > self.preview, max(self.preview, index)
            case _:
                fresh = True
        return fresh


async def with_retries(
    request: GenerationRequest,
    attempt: Try,
    retried: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Event, None]:
    """The events of a request up to its end, over as many replicas as it takes, up to a limit.

    `retried` is called with the model's id whenever another replica is tried.

    Raises:
        NotReadyError: every replica that tried it was lost.
        ServerFullError: Ray Serve's own queue in front of the replicas is full.
    """
    began_s, told = clock(), Told()
    first: LostError | None = None
    for number in range(1, MOST_TRIES + 1):
        try:
            async with aclosing(_one_try(request, attempt, told)) as events:
                async for event in events:
                    yield event
            return
        except LostError as lost:
            # What happened to it, rather than why nobody else would have it.
            first = first or lost
            if number == MOST_TRIES:
                raise first.error from lost
            logger.warning("request %s is tried again: %s", request.id, lost)
            retried(request.model)
        await asyncio.sleep(PAUSE_S * number)
        request = _with_time_left(request, began_s, clock())
        began_s = clock()


async def _one_try(
    request: GenerationRequest, attempt: Try, told: Told
) -> AsyncGenerator[Event, None]:
    try:
        async with aclosing(attempt(request)) as events:
            async for event in events:
                if isinstance(event, Failed) and isinstance(event.error, ENDED_BY_REPLICA):
                    raise LostError(event.error)
                if told.is_new(event):
                    yield event
                if isinstance(event, Finished | Failed):
                    return
    except RayTaskError:
        # Raised by our own code, on a replica that is well.
        raise
    except (RayError, RayServeException) as error:
        raise _meaning(error, request.model) from error


def _meaning(error: RayError | RayServeException, model_id: str) -> LostError | StepserveError:
    if isinstance(error, BackPressureError):
        return ServerFullError("the queue in front of the model is full", RETRY_AFTER_S)
    message = f"model {model_id} lost the replica that worked on this request"
    ours = NotReadyError(message, RETRY_AFTER_S)
    return LostError(ours) if isinstance(error, LOST) else ours


def _with_time_left(request: GenerationRequest, began_s: float, now_s: float) -> GenerationRequest:
    if request.deadline_s is None:
        return request
    left_s = request.deadline_s - (now_s - began_s)
    if left_s < MIN_DEADLINE_S:
        raise ExpiredError("its replica was lost, and its deadline passed before another had it")
    return replace(request, deadline_s=left_s)
