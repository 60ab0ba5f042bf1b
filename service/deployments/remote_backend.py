"""The API's backend over Ray Serve handles: one handle a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from service.api.backend import ModelStatus
from service.deployments.model_watch import ModelWatch
from service.domain.batch import BatchView
from service.domain.errors import NotReadyError, ServerFullError
from service.domain.events import Event, Outcome
from service.domain.progress import Progress
from service.domain.request_log import NumberedEvent
from service.domain.requests import GenerationRequest

RETRY_AFTER_S = 3.0
# Answered from memory between two awaits; a replica that takes longer is as good as gone.
ASK_TIMEOUT_S = 5.0


class RemoteBackend:
    """Sends requests to model replicas, and keeps an eye on whether they answer.

    Args:
        handles: Ray Serve deployment handles by model id.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self._watch = ModelWatch({m: handle.capabilities.remote for m, handle in handles.items()})

    async def start(self) -> None:
        """Begin to watch the models."""
        await self._watch.start()

    async def models(self) -> Sequence[ModelStatus]:
        """The latest status of every model."""
        return self._watch.statuses()

    async def model(self, model_id: str) -> ModelStatus | None:
        """The latest status of one model, or None if there is no such model."""
        return await self._watch.status(model_id)

    async def generate(self, request: GenerationRequest) -> Outcome:
        """Serve a request on some replica of its model; cancelling this call cancels it there.

        Raises:
            NotReadyError: no replica could take it, or the replica died while working on it.
            ServerFullError: Ray Serve's own queue in front of the replicas is full.
        """
        with _told_as_ours(request.model):
            outcome: Outcome = await self._handles[request.model].generate.remote(request)
            return outcome

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Serve a request as `generate` does, and tell what happens to it up to its end.

        Raises:
            NotReadyError: no replica could take it, or the replica died while working on it.
            ServerFullError: Ray Serve's own queue in front of the replicas is full.
        """
        with _told_as_ours(request.model):
            handle = self._handles[request.model].options(stream=True)
            events = handle.stream.remote(request)
            try:
                async for event in events:
                    yield event
            finally:
                events.cancel()

    async def progress(self, request_id: str) -> Progress | None:
        """Where a request stands, whichever replica has it; None if none does."""
        return _first_at_work(await self._ask_all("progress", request_id))

    async def cancel(self, request_id: str) -> Progress | None:
        """End a request at its next step, whichever replica has it; None if none does."""
        return _first_at_work(await self._ask_all("cancel", request_id))

    async def events(
        self, request_id: str, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Events of a request from `number` on, as soon as there are any; None if it is unknown."""
        answers = await self._ask_all("events", request_id, number, wait_s, slack_s=wait_s)
        known: list[Sequence[NumberedEvent]] = [a for a in answers if a is not None]
        return max(known, key=len) if known else None

    async def batch(self, model_id: str) -> Sequence[BatchView]:
        """What each replica of a model has in hand."""
        views: list[BatchView] = await self._ask_replicas(model_id, "batch")
        return views

    async def _ask_all(self, method: str, *arguments: Any, slack_s: float = 0.0) -> list[Any]:
        """The answers of all replicas of all models: only they know which requests they have."""
        answers = await asyncio.gather(
            *(self._ask_replicas(m, method, *arguments, slack_s=slack_s) for m in self._handles)
        )
        return [answer for of_model in answers for answer in of_model]

    async def _ask_replicas(
        self, model_id: str, method: str, *arguments: Any, slack_s: float = 0.0
    ) -> list[Any]:
        reply = self._handles[model_id].broadcast(method, *arguments)
        try:
            answers = await reply.results_async(
                timeout_s=ASK_TIMEOUT_S + slack_s, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            # Loading, or gone: it has nothing to tell.
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


@contextmanager
def _told_as_ours(model_id: str) -> Iterator[None]:
    try:
        yield
    except BackPressureError as error:
        raise ServerFullError("the queue in front of the model is full", RETRY_AFTER_S) from error
    except (RayError, RayServeException) as error:
        message = f"model {model_id} lost the replica that worked on this request"
        raise NotReadyError(message, RETRY_AFTER_S) from error


def _first_at_work(answers: Sequence[Progress | None]) -> Progress | None:
    """An id may have been used before, on another replica: who is at work goes before the ended."""
    known = [answer for answer in answers if answer is not None]
    return min(known, key=lambda progress: (progress.ended, -progress.created), default=None)
