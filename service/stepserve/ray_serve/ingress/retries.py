"""Requests whose replica was lost are served by another one: same seed, same images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

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

from stepserve.domain.checks.limits import MIN_DEADLINE_S
from stepserve.domain.errors import (
    ExpiredError,
    NotReadyError,
    ServerFullError,
    StepserveError,
    StoppedError,
)
from stepserve.domain.events import Event, Failed, Finished, Preview
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

Attempt = Callable[[GenerationRequest], AbstractAsyncContextManager[AsyncIterator[Event]]]
"""Submits a request to one replica; leaving the context ends it there if it has not ended."""


async def with_retries(
    request: GenerationRequest,
    attempt: Attempt,
    retried: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Event, None]:
    """The events of a request up to its end, over as many replicas as it takes, up to a limit.

    Each attempt starts from the beginning; what the client has heard is not repeated. `retried` is
    called with the model's id whenever another replica is tried.

    Raises:
        NotReadyError: every replica that tried it was lost.
        ServerFullError: Ray Serve's own queue in front of the replicas is full.
    """
    heard = 0
    first: StepserveError | None = None
    for number in range(1, MOST_TRIES + 1):
        began_s = clock()
        try:
            async with attempt(request) as events:
                async for event in events:
                    if isinstance(event, Finished | Failed):
                        break
                    if (place := _place(event)) >= heard:
                        heard = place + 1
                        yield event
                else:
                    raise AssertionError("a request ends with Finished or Failed")
            lost = _lost_by(event)
        except (RayError, RayServeException) as error:
            lost = _meaning(error, request.model)
        if lost is None:
            yield event
            return
        # What happened to it, rather than why no other replica would have it.
        first = first or lost
        if number == MOST_TRIES:
            raise first
        logger.warning("request %s is tried again: %s", request.id, lost)
        retried(request.model)
        await asyncio.sleep(PAUSE_S * number)
        request = _with_time_left(request, began_s, clock())


def _place(event: Event) -> int:
    """Where an event stands among those before the end: accepted, then the previews."""
    return event.index + 1 if isinstance(event, Preview) else 0


def _lost_by(end: Finished | Failed) -> StepserveError | None:
    """Why another replica should try; None where this is the end."""
    if isinstance(end, Failed) and isinstance(end.error, ENDED_BY_REPLICA):
        return end.error
    return None


def _meaning(error: RayError | RayServeException, model_id: str) -> StepserveError:
    """What to say if the attempt that this ended was the last one.

    Raises:
        ServerFullError: Ray Serve's own queue in front of the replicas is full.
        NotReadyError: another replica would not mend it.
        RayTaskError: our own code raised, on a replica that is well.
    """
    if isinstance(error, RayTaskError):
        raise error
    if isinstance(error, BackPressureError):
        message = "the queue in front of the model is full"
        raise ServerFullError(message, RETRY_AFTER_S) from error
    message = f"model {model_id} lost the replica that had this request"
    ours = NotReadyError(message, RETRY_AFTER_S)
    if not isinstance(error, LOST):
        raise ours from error
    return ours


def _with_time_left(request: GenerationRequest, began_s: float, now_s: float) -> GenerationRequest:
    if request.deadline_s is None:
        return request
    left_s = request.deadline_s - (now_s - began_s)
    if left_s < MIN_DEADLINE_S:
        raise ExpiredError("replica lost; deadline expired before the retry")
    return replace(request, deadline_s=left_s)
