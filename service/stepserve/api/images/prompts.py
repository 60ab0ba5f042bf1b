"""From the requests for several prompts of one call to its response: whole, or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain

from fastapi import Response

from stepserve.api.auth.access import key_use_of
from stepserve.api.dependencies import Incoming
from stepserve.api.errors import (
    RequestTimedOutError,
    common_error,
    error_detail,
    note_error,
    note_failure,
)
from stepserve.api.exchange_context import exchange_context_of
from stepserve.api.http.connection import merged, while_connected
from stepserve.api.images.events import KEEP_ALIVE_S, EventStreamResponse, sse
from stepserve.api.images.generation import ImageResponder
from stepserve.api.images.responses import (
    ImageData,
    ImagesResponse,
    parameters_response,
    prompt_entries,
    prompts_response,
)
from stepserve.domain.checks.limits import check_request
from stepserve.domain.errors import (
    CancelledError,
    InvalidRequestError,
    StepserveError,
    StoppedError,
)
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import GenerationRequest

PromptEvent = tuple[int, Event]
"""What happened to the request for a prompt, by the prompt's index."""


def split_call(call: GenerationRequest, prompts: Sequence[str]) -> tuple[GenerationRequest, ...]:
    """The requests for the prompts of a call.

    Each has a seed of its own, so that it makes the same images when it is sent alone.

    Args:
        call: what they have in common, and the first one's seed.
    """
    return tuple(
        replace(call, id=call.key.of_prompt(i).id, prompt=prompt, seed=call.seed + i * call.n)
        for i, prompt in enumerate(prompts)
    )


def check_any(requests: Sequence[GenerationRequest], model: ModelCapabilities) -> None:
    """Return if `model` can serve at least one of `requests` as it is.

    Raises:
        InvalidRequestError: what is wrong with the first one.
    """
    errors: list[InvalidRequestError] = []
    for request in requests:
        try:
            check_request(request, model)
        except InvalidRequestError as error:
            errors.append(error)
    if len(errors) == len(requests):
        raise errors[0]


@dataclass(frozen=True)
class PromptsResponder:
    """Submits a request for each prompt, and writes the response. Each prompt fails by itself.

    The client leaving cancels all of them.

    Args:
        model: what it can do.
        call: what the requests have in common.
        prompts: who writes what becomes of each of them.
    """

    model: ModelCapabilities
    call: GenerationRequest
    prompts: tuple[ImageResponder, ...]

    async def whole(self, response: Response) -> ImagesResponse:
        """Serve all requests to their ends, and return the body.

        Args:
            response: its headers are added to.

        Raises:
            StepserveError: no prompt has images.
        """
        entries: dict[int, list[ImageData]] = {}
        errors: list[Exception] = []
        last: Finished | None = None
        async with aclosing(self._events()) as events:
            async for index, event in _without_pauses(events):
                try:
                    if isinstance(event, Finished):
                        entries[index], last = await self._entries(index, event), event
                    elif isinstance(event, Failed):
                        raise event.error
                except StepserveError as error:
                    entries[index] = [self._failed_entry(index, error)]
                    errors.append(error)
        if last is None:
            raise common_error(errors)
        return self._body([entries[index] for index in sorted(entries)], last, response)

    async def stream(self) -> Response:
        """Begin to stream, once one prompt is not refused: else the refusal has its own status.

        Raises:
            StepserveError: every request is refused.
        """
        events = self._events()
        begun: list[PromptEvent] = []
        try:
            async for item in _without_pauses(events):
                begun.append(item)
                if not isinstance(item[1], Failed):
                    break
            else:
                raise common_error([self._noted(event) for _, event in begun])
        except BaseException:
            await events.aclose()
            raise
        rest = _continued(begun, events)
        return EventStreamResponse[PromptEvent](rest, self._write, self._fail)

    @property
    def _incoming(self) -> Incoming:
        return self.prompts[0].incoming

    async def _events(self) -> AsyncGenerator[PromptEvent | None, None]:
        """What happens to all requests, each up to its end, and None after every quiet while.

        What ends the whole call but for the client's leaving ends those that had not ended.

        Raises:
            CancelledError: the client left.
        """
        incoming, requests = self._incoming, [prompt.request for prompt in self.prompts]
        notes = exchange_context_of(incoming.http.scope)
        notes.generation, notes.prompts = requests[0], tuple(r.prompt for r in requests)
        sources = [self._events_of(i, request) for i, request in enumerate(requests)]
        timeout_s, stopped = incoming.settings.http.request_timeout_s, incoming.stopped
        events = while_connected(
            incoming.http.receive, merged(sources), timeout_s, stopped, KEEP_ALIVE_S
        )
        in_flight = dict(enumerate(requests))
        try:
            async with aclosing(events):
                async for item in events:
                    if item is not None and isinstance(item[1], Finished | Failed):
                        del in_flight[item[0]]
                    yield item
        except (RequestTimedOutError, StoppedError) as error:
            for index, request in in_flight.items():
                yield index, Failed(request.id, error)

    async def _events_of(
        self, index: int, request: GenerationRequest
    ) -> AsyncGenerator[Event, None]:
        """The events of one request up to its end, also where its submission raises."""
        try:
            check_request(request, self.model)
            events = self._incoming.backend.submit(request)
            async with self._place(index), aclosing(events):
                async for event in events:
                    yield event
        except StepserveError as error:
            yield Failed(request.id, error)
        except Exception as error:
            fault = StepserveError(f"request {request.id} failed: {error!r}")
            fault.__cause__ = error
            yield Failed(request.id, fault)

    def _place(self, index: int) -> AbstractAsyncContextManager[None]:
        """Count the request as one of its key's; the call itself is counted as the first."""
        use = key_use_of(self._incoming.http.scope)
        return nullcontext() if use is None or index == 0 else use.place()

    async def _entries(self, index: int, finished: Finished) -> list[ImageData]:
        prompt = self.prompts[index]
        return prompt_entries(prompt.request, index, finished, await prompt.image_data(finished))

    def _failed_entry(self, index: int, error: Exception) -> ImageData:
        prompt = self.prompts[index]
        told = prompt.failure(error)
        parameters = parameters_response(prompt.request)
        return ImageData(
            prompt_index=index, seed=prompt.request.seed, error=told, parameters=parameters
        )

    def _body(
        self, entries: Sequence[list[ImageData]], last: Finished, response: Response
    ) -> ImagesResponse:
        exchange_context_of(self._incoming.http.scope).timings = last.timings
        response.headers["Server-Timing"] = last.timings.server_timing()
        texts = [prompt.request.prompt for prompt in self.prompts]
        ignored = self.prompts[0].ignored_fields
        return prompts_response(self.call, texts, last, list(chain(*entries)), ignored)

    def _noted(self, event: Event) -> Exception:
        assert isinstance(event, Failed)
        note_failure(self._incoming.http.scope, event.error)
        return event.error

    async def _write(self, item: PromptEvent) -> list[bytes]:
        index, event = item
        try:
            return await self.prompts[index].write(event)
        except StepserveError as error:
            # The image cannot be kept as a link, say: the others may be made all the same.
            return await self.prompts[index].write(Failed(event.request_id, error))

    def _fail(self, error: Exception) -> bytes | None:
        note_error(self._incoming.http.scope, error)
        if isinstance(error, CancelledError):
            # The client left.
            return None
        detail = error_detail(error, self.call.id).model_dump()
        return sse("error", {"type": "error", "error": detail})


async def _without_pauses(
    events: AsyncGenerator[PromptEvent | None, None],
) -> AsyncGenerator[PromptEvent, None]:
    async for item in events:
        if item is not None:
            yield item


async def _continued(
    begun: Sequence[PromptEvent], rest: AsyncGenerator[PromptEvent | None, None]
) -> AsyncGenerator[PromptEvent | None, None]:
    async with aclosing(rest):
        for item in begun:
            yield item
        async for later in rest:
            yield later
