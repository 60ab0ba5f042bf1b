"""What the API needs of a backend that makes images."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from stepserve.domain.events import Event
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import GenerationRequest, RequestKey


class Backend(Protocol):
    """Makes images. Implemented over Ray Serve handles, or in one process."""

    async def start(self) -> None:
        """Begin to serve; called once, on the event loop of all other calls."""
        ...

    async def models(self) -> Sequence[ModelStatus]:
        """Return every served model, also those that are still loading."""
        ...

    async def model(self, model_id: str) -> ModelStatus | None:
        """Return one served model, also if it is still loading, or None if there is no such."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Serve `request`: it is accepted, has previews, and ends in `Finished` or `Failed`.

        Closing the events cancels it.

        Raises:
            StepserveError: as an alternative to the error inside `Failed`.
        """
        ...

    async def progress(self, key: RequestKey) -> Progress | None:
        """Return where a request stands, or None if its owner has no such request."""
        ...

    async def prompts(self, call: RequestKey) -> Sequence[Progress]:
        """Return where the requests for the prompts of a call stand; none of any other call."""
        ...

    async def cancel(self, key: RequestKey) -> Progress | None:
        """End a request at its next step, if it has not ended; None if its owner has none such."""
        ...

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """Return a request's events from `number` on, or wait up to `wait_s` for the next.

        None if its owner has no such request.
        """
        ...

    async def batch(self, model_id: str, owner: str) -> Sequence[BatchView]:
        """Return the batch of each replica of a model, without the ids of others' requests."""
        ...
