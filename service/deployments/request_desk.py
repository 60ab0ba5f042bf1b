"""The requests of one replica by id: handed in, followed, asked after, given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from service.domain.errors import GenerationFailedError
from service.domain.events import Event, Failed
from service.domain.progress import Progress
from service.domain.request_log import NumberedEvent, RequestLog
from service.domain.requests import GenerationRequest
from service.routing.reports import Job, Report, StepCost, job_of, size_of

if TYPE_CHECKING:
    from service.pipelines.runner import PipelineRunner

logger = logging.getLogger(__name__)

STEP_BACK_S = 2.0
"""How long a request waits for one of the same id that was given up to reach its next step."""

EventQueue = asyncio.Queue[Event]


class Watcher(Protocol):
    """Hears of requests and of what happens to them; must return at once."""

    def begin(self, request: GenerationRequest) -> None:
        """A request is about to be handed in."""
        ...

    def hear(self, event: Event) -> None:
        """Something happened to a request."""
        ...


class NotWatched:
    """Nobody cares."""

    def begin(self, request: GenerationRequest) -> None:
        """Ignored."""

    def hear(self, event: Event) -> None:
        """Ignored."""


NOT_WATCHED = NotWatched()


class RequestDesk:
    """Between an event loop, whose calls these are, and the engine's threads."""

    def __init__(self, runner: PipelineRunner, watcher: Watcher = NOT_WATCHED) -> None:
        self._runner = runner
        self._watcher = watcher
        self._log = RequestLog(time.monotonic, time.time)
        self._queues: dict[str, EventQueue] = {}
        self._given_up: set[str] = set()
        self._jobs: dict[str, Job] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[Event] = deque()
        self._collecting = False
        # Replaced at every event: whoever waits for news waits for the one there is now.
        self._news: dict[str, asyncio.Event] = {}

    async def submit(self, request: GenerationRequest) -> EventQueue:
        """Hand a request in; its events come in order, the last one is its end.

        Raises:
            RequestIdInUseError: a request of that id is still at work.
        """
        await self._let_step_back(request.id)
        self._log.open(request)
        queue = self._queues[request.id] = EventQueue()
        self._jobs[request.id] = job_of(request)
        self._loop = asyncio.get_running_loop()
        try:
            self._watcher.begin(request)
            self._runner.submit(request, self._post)
        except Exception as error:
            # Else its id would be at work for ever, and whoever waits would never hear of an end.
            logger.exception("request %s cannot be handed in", request.id)
            message = f"request {request.id} cannot be handed in: {error!r}"
            self._post(Failed(request.id, GenerationFailedError(message)))
        return queue

    def give_up(self, request_id: str) -> None:
        """End a request at its next step. Does nothing if it has ended or is not known."""
        if self._log.is_running(request_id):
            self._given_up.add(request_id)
            self._runner.cancel(request_id)

    def cancel(self, request_id: str, owner: str) -> Progress | None:
        """Give up a request of `owner`, and tell where it stands; None if there is none such."""
        if self._log.belongs_to(owner, request_id):
            self.give_up(request_id)
        return self.progress(request_id, owner)

    def progress(self, request_id: str, owner: str) -> Progress | None:
        """Where a request stands now, or None if `owner` has none such.

        Callers choose ids: the same one may be another caller's, here or on another replica.
        """
        if not self._log.belongs_to(owner, request_id):
            return None
        progress = self._log.progress(request_id)
        if progress is None or progress.ended:
            return progress
        outlook = self._runner.outlook_of(request_id)
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
                replace(job, steps=steps[name]) for name, job in self._jobs.items() if name in steps
            ),
            costs={_size(size): StepCost(*cost) for size, cost in engine.step_costs().items()},
            picture_limit=engine.options.max_waiting_pictures,
        )

    async def events(
        self, request_id: str, owner: str, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Events from `number` on: at once if there are any, else the next, or none in time.

        None if `owner` has no such request.
        """
        events = self._events_since(request_id, owner, number)
        if events or events is None or not self._log.is_running(request_id):
            return events
        await self._wait_for_news(request_id, wait_s)
        return self._events_since(request_id, owner, number)

    def _events_since(
        self, request_id: str, owner: str, number: int
    ) -> Sequence[NumberedEvent] | None:
        known = self._log.belongs_to(owner, request_id)
        return self._log.events_since(request_id, number) if known else None

    def _post(self, event: Event) -> None:
        """Called by the engine's threads at every step of every request: must cost next to nothing.

        Waking the loop takes a system call, so it is woken once for all that has come meanwhile.
        """
        self._posted.append(event)
        if not self._collecting:
            self._collecting = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        # First of all: what is posted from now on wakes the loop again.
        self._collecting = False
        while self._posted:
            self._hear(self._posted.popleft())

    def _hear(self, event: Event) -> None:
        request_id = event.request_id
        self._log.add(event)
        self._watcher.hear(event)
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(event)
        if not self._log.is_running(request_id):
            self._queues.pop(request_id, None)
            self._jobs.pop(request_id, None)
            self._given_up.discard(request_id)
        news = self._news.pop(request_id, None)
        if news is not None:
            news.set()

    async def _let_step_back(self, request_id: str) -> None:
        """A client that left and comes again must not be told that it is still here."""
        deadline_s = time.monotonic() + STEP_BACK_S
        while request_id in self._given_up and time.monotonic() < deadline_s:
            await self._wait_for_news(request_id, STEP_BACK_S)

    async def _wait_for_news(self, request_id: str, wait_s: float) -> None:
        news = self._news.setdefault(request_id, asyncio.Event())
        try:
            await asyncio.wait_for(news.wait(), wait_s)
        except TimeoutError:
            return


def _size(size: object) -> str:
    return size_of(*size) if isinstance(size, tuple) else str(size)
