"""The requests of one replica by id and owner: submitted, followed, asked after, cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stepserve.domain.errors import GenerationFailedError, RequestIdInUseError, StoppedError
from stepserve.domain.events import Event, Failed, Finished, Started, StepFinished
from stepserve.domain.progress import Progress
from stepserve.domain.request_log import NumberedEvent, RequestLog, RequestRecord
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.ray_serve.replica.heartbeats import IngressHeartbeats
from stepserve.routing.reports import AdapterMixing, Report, StepCost, job_of, size_of

if TYPE_CHECKING:
    from stepserve.pipelines.serving.runner import PipelineRunner
    from stepserve.telemetry.request_traces import RequestTraces

logger = logging.getLogger(__name__)

CANCELLING_S = 2.0
"""How long a request waits for a cancelled one of the same id to reach its next step."""

LEAVING_S = 1.0
"""How long a request waits for one of the same id to be cancelled: its client may have left just
now, and that shows only when it is written to."""


class RequestTracker:
    """Between an event loop, whose calls these are, and the engine's threads.

    Args:
        traces: hears of each request and its events; None where nothing is traced.
        leaving_s: how long a request waits for one of the same id that is in flight.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        traces: RequestTraces | None = None,
        leaving_s: float = LEAVING_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._traces = traces
        self._leaving_s = leaving_s
        self._clock = clock
        self._log = RequestLog(clock, time.time)
        self._heartbeats = IngressHeartbeats(clock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[tuple[RequestKey, Event]] = deque()
        self._collecting = False

    async def submit(
        self, request: GenerationRequest, ingress: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Submit a request, and yield what its sender must hear: up to its end, in order.

        That it has started, and its steps, are left out: each would cross processes, and no
        response has them. `events` has all.

        Closing this, or cancelling its reader, cancels the request; so does an `ingress` of
        that id that is not heard from any more.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        if ingress:
            self._heartbeats.hear(ingress)
        await self._wait_until_free(request.key)
        try:
            record = self._log.open(request, ingress)
        except RequestIdInUseError as error:
            yield Failed(request.id, error)
            return

        def listener(event: Event) -> None:
            if not isinstance(event, Started | StepFinished):
                events.put_nowait(event)

        record.listeners.append(listener)
        self._submit(request, record)
        try:
            while not isinstance(event := await events.get(), Finished | Failed):
                yield event
            yield event
        finally:
            # What has ended is remembered for long, and must not hold images.
            record.listeners.remove(listener)
            self._cancel(record)

    def hear(self, ingress: str) -> None:
        """Note that an ingress is there."""
        self._heartbeats.hear(ingress)

    def cancel_orphans(self) -> None:
        """Cancel the requests whose ingress has been silent for too long."""
        for record in self._log.in_flight():
            if record.is_orphaned or not record.ingress:
                continue
            if self._heartbeats.is_silent(record.ingress):
                logger.warning("request %s is cancelled: its ingress is gone", record.key.id)
                record.is_orphaned = True
                self._cancel(record)

    def cancel(self, key: RequestKey) -> Progress | None:
        """End a request at its next step; where it stands, or None if its owner has none such."""
        record = self._log.find(key)
        if record is not None:
            self._cancel(record)
        return self.progress(key)

    def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands now, or None if its owner has none of that id."""
        progress = self._log.progress(key)
        if progress is None or progress.ended:
            return progress
        estimate = self._runner.estimator_of(key)
        if estimate is None:
            return progress
        position, expected_s = estimate
        return replace(progress, position=position, expected_s=expected_s)

    def prompts(self, call: RequestKey) -> Sequence[Progress]:
        """Where the requests for the prompts of a call stand that are here; none of other calls."""
        found = (self.progress(key) for key in self._log.prompts_of(call))
        return [progress for progress in found if progress is not None]

    def report(self) -> Report:
        """What routers should know of the requests in flight, and of what steps cost here."""
        engine, guidance = self._runner.engine, self._runner.model.capabilities.guidance
        adapters = self._runner.adapters
        mixing = AdapterMixing(adapters.can_mix(None), adapters.separate())
        demands = engine.demands()
        requests = (record.request for record in self._log.in_flight())
        return Report(
            jobs=tuple(
                job_of(request, guidance, adapters=mixing).left(
                    demand.rows, [p.steps for p in demand.parts]
                )
                for request in requests
                if request is not None and (demand := demands.get(request.key))
            ),
            costs={_size(size): StepCost(*cost) for size, cost in engine.step_costs().items()},
            image_limit=engine.options.max_pending_images,
            guidance=guidance,
            run_shares=engine.run_shares(),
            adapters=mixing,
        )

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Events from `number` on: at once if there are any, else the next, or none in time.

        None if its owner has no such request.
        """
        record, events = self._log.find(key), self._log.events_since(key, number)
        if record is None or events or record.progress.ended:
            return events
        await _wait_for_event(record, wait_s)
        return self._log.events_since(key, number)

    def _submit(self, request: GenerationRequest, record: RequestRecord) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            if self._traces is not None:
                self._traces.begin(request)
                record.listeners.append(partial(self._traces.add_event, request.key))
            self._runner.submit(request, partial(self._post, request.key))
        except Exception as error:
            # Else its id would be in use for ever, and its sender would wait for ever.
            logger.exception("request %s cannot be submitted", request.id)
            message = f"request {request.id} cannot be submitted: {error!r}"
            self._post(request.key, Failed(request.id, GenerationFailedError(message)))

    def _cancel(self, record: RequestRecord) -> None:
        if not record.progress.ended:
            record.is_cancelled = True
            self._runner.cancel(record.key)

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
        record = self._log.find(key)
        if record is not None and record.is_orphaned and isinstance(event, Failed):
            event = Failed(key.id, StoppedError("cancelled: lost contact with the ingress"))
        self._log.add(key, event)

    async def _wait_until_free(self, key: RequestKey) -> None:
        """A client that left and comes again must not be refused because of itself."""
        began_s = self._clock()
        while (record := self._log.find(key)) is not None and not record.progress.ended:
            patience_s = CANCELLING_S if record.is_cancelled else self._leaving_s
            left_s = began_s + patience_s - self._clock()
            if left_s <= 0:
                return
            await _wait_for_event(record, left_s)


async def _wait_for_event(record: RequestRecord, wait_s: float) -> None:
    heard = asyncio.Event()

    def listener(event: Event) -> None:
        heard.set()

    record.listeners.append(listener)
    try:
        await asyncio.wait_for(heard.wait(), wait_s)
    except TimeoutError:
        return
    finally:
        record.listeners.remove(listener)


def _size(size: object) -> str:
    return size_of(*size) if isinstance(size, tuple) else str(size)
