"""The API's backend over Ray Serve handles: one handle a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any
from uuid import uuid4

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stepserve.domain.events import Event
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.ray_serve.applications import list_models, model_handle
from stepserve.ray_serve.ingress.broadcast import responses
from stepserve.ray_serve.ingress.model_watch import ModelWatch
from stepserve.ray_serve.ingress.retries import with_retries

# The reply comes from memory; a replica that takes longer is as good as gone.
ASK_TIMEOUT_S = 5.0

Question = tuple[RequestKey, int, float]
"""Whose events, from which number on, and for how many seconds they are waited for."""


class RemoteBackend:
    """Sends requests to model replicas, and watches whether they reply.

    Args:
        retried: called with a model's id whenever a request of it goes to another replica.
        aliases: other names of models, by id, until they say theirs.
        compiled: ids of models that are compiled before they are ready.
    """

    def __init__(
        self,
        retried: Callable[[str], None],
        aliases: Mapping[str, tuple[str, ...]],
        compiled: Collection[str] = (),
    ) -> None:
        self._retried = retried
        self._handles: dict[str, Any] = {}
        self._id = uuid4().hex
        self._asking: set[asyncio.Task[list[Any]]] = set()
        self._following: dict[Question, asyncio.Task[Sequence[NumberedEvent] | None]] = {}
        self._watch = ModelWatch(
            list_models, self._status, self._status_once_awake, aliases, compiled=compiled
        )

    async def start(self) -> None:
        """Begin to watch the models."""
        await self._watch.start()

    async def models(self) -> Sequence[ModelStatus]:
        """The latest status of every model."""
        return self._watch.statuses()

    async def model(self, model_id: str) -> ModelStatus | None:
        """The latest status of one model, or None if there is no such model."""
        return await self._watch.status(model_id)

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Serve a request on some replica of its model; closing the events cancels it there.

        Raises:
            NotReadyError: no replica could take it, or each that had it was lost.
            ServerFullError: Ray Serve's own queue in front of the replicas is full.
        """
        return with_retries(request, self._attempt, self._retried)

    @asynccontextmanager
    async def _attempt(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[Event]]:
        handle = self._handle(request.model).options(method_name="submit", stream=True)
        events = handle.remote(request, self._id)
        try:
            yield events
        except (asyncio.CancelledError, GeneratorExit):
            events.cancel()
            self._cancel_everywhere(request)
            raise

    def _cancel_everywhere(self, request: GenerationRequest) -> None:
        """Its client left. Ray's own cancelling of a call may get lost."""
        cancelling = self._ask_replicas(request.model, "cancel", request.key)
        asking = asyncio.create_task(cancelling)
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands, whichever replica has it; None if none does."""
        return _first_in_flight(await self._ask_all("progress", key))

    async def prompts(self, call: RequestKey) -> Sequence[Progress]:
        """Where the requests for the prompts of a call stand, whichever replicas have them."""
        replies: list[Sequence[Progress]] = await self._ask_all("prompts", call)
        by_key: dict[RequestKey, list[Progress]] = {}
        for progress in chain.from_iterable(replies):
            by_key.setdefault(progress.key, []).append(progress)
        found = [_first_in_flight(same) for same in by_key.values()]
        return [progress for progress in found if progress is not None]

    async def cancel(self, key: RequestKey) -> Progress | None:
        """End a request at its next step, whichever replica has it; None if none does."""
        return _first_in_flight(await self._ask_all("cancel", key))

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Events of a request from `number` on, as soon as there are any; None if it is unknown.

        Each replica is asked: those who follow a request together ask together.
        """
        question = (key, number, wait_s)
        if question not in self._following:
            asking = self._following[question] = asyncio.create_task(self._events(*question))
            asking.add_done_callback(lambda _: self._following.pop(question))
        # Asking goes on for others if one of them leaves.
        return await asyncio.shield(self._following[question])

    async def _events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        replies = await self._ask_all("events", key, number, wait_s, slack_s=wait_s)
        known: list[Sequence[NumberedEvent]] = [events for events in replies if events is not None]
        return max(known, key=len) if known else None

    async def batch(self, model_id: str, owner: str) -> Sequence[BatchView]:
        """The batch of each replica of a model, without the ids of other owners' requests."""
        views: list[BatchView | None] = await self._ask_replicas(model_id, "batch", owner)
        return [view for view in views if view is not None]

    def _handle(self, model_id: str) -> Any:
        if model_id not in self._handles:
            self._handles[model_id] = model_handle(model_id)
        return self._handles[model_id]

    async def _status(self, model_id: str) -> ModelStatus | None:
        """How a model is: if any of its replicas takes requests, it does.

        It is also the heartbeat: replicas cancel the requests of a silent ingress.
        """
        statuses: list[ModelStatus] = await self._ask_replicas(model_id, "status", self._id)
        return max(statuses, key=lambda status: status.ready, default=None)

    async def _status_once_awake(self, model_id: str) -> ModelStatus:
        """How a model is, as soon as there is a replica: to wait for one wakes the model."""
        status: ModelStatus = await self._handle(model_id).status.remote(self._id)
        return status

    async def _ask_all(self, method: str, *arguments: Any, slack_s: float = 0.0) -> list[Any]:
        """The replies of all replicas of all models: only they know which requests they have."""
        model_ids = [status.capabilities.id for status in self._watch.statuses()]
        of_models = await asyncio.gather(
            *(self._ask_replicas(m, method, *arguments, slack_s=slack_s) for m in model_ids)
        )
        return [response for of_model in of_models for response in of_model]

    async def _ask_replicas(
        self, model_id: str, method: str, *arguments: Any, slack_s: float = 0.0
    ) -> list[Any]:
        try:
            broadcast = self._handle(model_id).broadcast(method, *arguments)
            return await responses(broadcast, ASK_TIMEOUT_S + slack_s)
        except (TimeoutError, RayError, RayServeException):
            # Loading, or gone.
            return []


def _first_in_flight(responses: Sequence[Progress | None]) -> Progress | None:
    """An id may have been used before, on another replica: in flight goes before ended."""
    known = [response for response in responses if response is not None]
    return min(known, key=lambda progress: (progress.ended, -progress.created), default=None)
