"""The requests of one replica by id and owner: handed in, followed, asked after, given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from stepserve.domain.errors import GenerationFailedError
from stepserve.domain.events import Event, Failed
from stepserve.domain.progress import Progress
from stepserve.domain.request_log import NumberedEvent, RequestLog
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.routing.reports import Job, Report, StepCost, job_of, size_of

if TYPE_CHECKING:
    from stepserve.pipelines.serving.runner import PipelineRunner

logger = logging.getLogger(__name__)

STEP_BACK_S = 2.0
"""How long a request waits for one of the same id that was given up to reach its next step."""

LEAVING_S = 1.0
"""How long a request waits for one of the same id to be given up: its client may have left just
now, and that shows only when it is written to."""

EventQueue = asyncio.Queue[Event]


class Watcher(Protocol):
    """Hears of requests and of what happens to them; must return at once."""

    def begin(self, request: GenerationRequest) -> None:
        """A request is about to be handed in."""
        ...

    def hear(self, key: RequestKey, event: Event) -> None:
        """Something happened to a request."""
        ...


class NotWatched:
    """Nobody cares."""

    def begin(self, request: GenerationRequest) -> None:
        """Ignored."""

    def hear(self, key: RequestKey, event: Event) -> None:
        """Ignored."""


NOT_WATCHED = NotWatched()


class RequestTracker:
    """Between an event loop, whose calls these are, and the engine's threads.

    Args:
        leaving_s: how long a request waits for one of the same id that is at work.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        watcher: Watcher = NOT_WATCHED,
        leaving_s: float = LEAVING_S,
    ) -> None:
        self._runner = runner
        self._leaving_s = leaving_s
        self._watcher = watcher
        self._log = RequestLog(time.monotonic, time.time)
        self._queues: dict[RequestKey, EventQueue] = {}
        self._given_up: set[RequestKey] = set()
        self._jobs: dict[RequestKey, Job] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[tuple[RequestKey, Event]] = deque()
        self._collecting = False
        # Replaced at every event: whoever waits for news waits for the one there is now.
        self._news: dict[RequestKey, asyncio.Event] = {}

    async def submit(self, request: GenerationRequest) -> EventQueue:
        """Hand a request in; its events come in order, the last one is its end.

        Raises:
            RequestIdInUseError: a request of that id and owner is still at work.
        """
        key = request.key
        await self._let_step_back(key)
        self._log.open(request)
        queue = self._queues[key] = EventQueue()
        self._jobs[key] = job_of(request, self._runner.guidance)
        self._loop = asyncio.get_running_loop()
        try:
            self._watcher.begin(request)
            self._runner.submit(request, partial(self._post, key))
        except Exception as error:
            # Else its id would be at work for ever, and whoever waits would never hear of an end.
            logger.exception("request %s cannot be handed in", request.id)
            message = f"request {request.id} cannot be handed in: {error!r}"
            self._post(key, Failed(request.id, GenerationFailedError(message)))
        return queue

    def give_up(self, key: RequestKey) -> None:
        """End a request at its next step. Does nothing if it has ended or is not known."""
        if self._log.is_running(key):
            self._given_up.add(key)
            self._runner.cancel(key)
            self._tell_news(key)

    def cancel(self, key: RequestKey) -> Progress | None:
        """Give up a request, and tell where it stands; None if there is none such."""
        self.give_up(key)
        return self.progress(key)

    def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands now, or None if its owner has none of that id."""
        progress = self._log.progress(key)
        if progress is None or progress.ended:
            return progress
        outlook = self._runner.estimator_of(key)
        if outlook is None:
            return progress
        position, expected_s = outlook
        return replace(progress, position=position, expected_s=expected_s)

    def report(self) -> Report:
        """What routers should know of what is in hand, and of what steps cost here."""
        engine = self._runner.engine
        steps = engine.steps_left()
        return Report(
            jobs=tuple(
                replace(job, steps=steps[key]) for key, job in self._jobs.items() if key in steps
            ),
            costs={_size(size): StepCost(*cost) for size, cost in engine.step_costs().items()},
            image_limit=engine.options.max_pending_images,
            guidance=self._runner.guidance,
        )

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Events from `number` on: at once if there are any, else the next, or none in time.

        None if its owner has no such request.
        """
        events = self._log.events_since(key, number)
        if events or events is None or not self._log.is_running(key):
            return events
        await self._wait_for_news(key, wait_s)
        return self._log.events_since(key, number)

    def _post(self, key: RequestKey, event: Event) -> None:
        """Called by the engine's threads at every step of every request: must cost next to nothing.

        Waking the loop takes a system call, so it is woken once for all that has come meanwhile.
        """
        self._posted.append((key, event))
        if not self._collecting:
            self._collecting = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        # First of all: what is posted from now on wakes the loop again.
        self._collecting = False
        while self._posted:
            self._hear(*self._posted.popleft())

    def _hear(self, key: RequestKey, event: Event) -> None:
        self._log.add(key, event)
        self._watcher.hear(key, event)
        queue = self._queues.get(key)
        if queue is not None:
            queue.put_nowait(event)
        if not self._log.is_running(key):
            self._queues.pop(key, None)
            self._jobs.pop(key, None)
            self._given_up.discard(key)
        self._tell_news(key)

    def _tell_news(self, key: RequestKey) -> None:
        news = self._news.pop(key, None)
        if news is not None:
            news.set()

    async def _let_step_back(self, key: RequestKey) -> None:
        """A client that left and comes again must not be told that it is still here."""
        began_s = time.monotonic()
        while self._log.is_running(key):
            patience_s = STEP_BACK_S if key in self._given_up else self._leaving_s
            left_s = began_s + patience_s - time.monotonic()
            if left_s <= 0:
                return
            await self._wait_for_news(key, left_s)

    async def _wait_for_news(self, key: RequestKey, wait_s: float) -> None:
        news = self._news.setdefault(key, asyncio.Event())
        try:
            await asyncio.wait_for(news.wait(), wait_s)
        except TimeoutError:
            return


def _size(size: object) -> str:
    return size_of(*size) if isinstance(size, tuple) else str(size)
