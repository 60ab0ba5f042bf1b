"""From a checked request to the response with its images: whole, or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Response

from stepserve.api.dependencies import Incoming
from stepserve.api.errors import (
    ErrorDetail,
    PromptError,
    error_detail,
    note_error,
    note_failure,
    prompt_error,
)
from stepserve.api.exchange_context import exchange_context_of
from stepserve.api.http.connection import while_connected
from stepserve.api.images.events import KEEP_ALIVE_S, EventStreamResponse, sse
from stepserve.api.images.responses import (
    ImageData,
    ImagesResponse,
    base64_of,
    images_response,
    parameters_response,
    truncation_response,
)
from stepserve.api.images.trajectories import TrajectoryResponse, trajectory_response
from stepserve.domain.errors import CancelledError
from stepserve.domain.events import EncodedImage, Event, Failed, Finished, Preview
from stepserve.domain.requests import GenerationRequest

NO_USAGE: dict[str, Any] = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""OpenAI's clients expect the number of tokens of an image: none."""


@dataclass(frozen=True)
class ImageResponder:
    """Submits one request, and writes the response. The client leaving cancels the request.

    Args:
        incoming: how it came in.
        request: what is to be made.
        sends_urls: whether the images are to be links.
        ignored_fields: were sent and change nothing.
        event_prefix: begins the names of streamed events, such as `image_generation`.
        prompt_index: which of several prompts of a call the request is for; None with one.
    """

    incoming: Incoming
    request: GenerationRequest
    sends_urls: bool
    ignored_fields: tuple[str, ...]
    event_prefix: str
    prompt_index: int | None = None

    async def whole(self, response: Response) -> ImagesResponse:
        """Serve the request to its end, and return the body.

        Args:
            response: its headers are added to.

        Raises:
            StepserveError: there are no images.
        """
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    return await self._body(event, response)
        raise AssertionError("a request ends with Finished or Failed")

    async def stream(self) -> Response:
        """Begin to stream. The first event is waited for, so that a refusal has its own status.

        Raises:
            StepserveError: the request is refused.
        """
        events = self._events()
        try:
            first = await anext(events)
            while first is None:
                first = await anext(events)
            if isinstance(first, Failed):
                raise first.error
        except BaseException:
            await events.aclose()
            raise
        return EventStreamResponse[Event](events, self.write, self._fail)

    def _events(self) -> AsyncGenerator[Event | None, None]:
        http, settings = self.incoming.http, self.incoming.settings.http
        exchange_context_of(http.scope).generation = self.request
        events = self.incoming.backend.submit(self.request)
        timeout_s, stopped = settings.request_timeout_s, self.incoming.stopped
        return while_connected(http.receive, events, timeout_s, stopped, KEEP_ALIVE_S)

    async def _body(self, finished: Finished, response: Response) -> ImagesResponse:
        exchange_context_of(self.incoming.http.scope).timings = finished.timings
        response.headers["Server-Timing"] = finished.timings.server_timing()
        return images_response(
            self.request, finished, await self.image_data(finished), self.ignored_fields
        )

    async def image_data(self, finished: Finished) -> list[ImageData]:
        """The images as they are sent.

        Raises:
            ResultsUnavailableError: they are to be links, and cannot be kept.
            ServerFullError: there is no room for the trajectories beside other requests.
        """
        return [await self._image_data(image) for image in finished.images]

    async def _image_data(self, image: EncodedImage) -> ImageData:
        if image.content_filtered:
            return ImageData(seed=image.seed, content_filtered=True)
        trajectory = await self._trajectory(image)
        if self.sends_urls:
            url = await self.incoming.link(image.data, image.media_type)
            return ImageData(url=url, seed=image.seed, trajectory=trajectory)
        return ImageData(b64_json=base64_of(image), seed=image.seed, trajectory=trajectory)

    async def _trajectory(self, image: EncodedImage) -> TrajectoryResponse | None:
        """The steps to an image, whose bytes are held until the response has been sent.

        Raises:
            ServerFullError: other requests hold too many.
        """
        if image.trajectory is None:
            return None
        self.incoming.hold.grow(image.trajectory.size_bytes)
        link = self.incoming.link if self.sends_urls else None
        return await trajectory_response(image.trajectory, link)

    async def write(self, event: Event) -> list[bytes]:
        """What a stream tells of an event of the request."""
        match event:
            case Preview(images=images):
                shown = ((i, image) for i, image in enumerate(images) if not image.content_filtered)
                return [self._partial_event(event, i, image) for i, image in shown]
            case Finished(images=images, timings=timings):
                exchange_context_of(self.incoming.http.scope).timings = timings
                return [
                    await self._completed_event(event, i, image) for i, image in enumerate(images)
                ]
            case Failed(error=error):
                return [self._error_event(error)]
        return []

    def _fail(self, error: Exception) -> bytes | None:
        if isinstance(error, CancelledError):
            # The client left.
            note_error(self.incoming.http.scope, error)
            return None
        return self._error_event(error)

    def _partial_event(self, preview: Preview, index: int, image: EncodedImage) -> bytes:
        data = {
            "b64_json": base64_of(image),
            "partial_image_index": preview.index,
            "step": preview.step,
            "steps": preview.steps,
        }
        return self._image_event("partial_image", index, image, data)

    async def _completed_event(self, finished: Finished, index: int, image: EncodedImage) -> bytes:
        image_data = await self._image_data(image)
        data: dict[str, Any] = {
            **image_data.model_dump(exclude_none=True),
            "usage": NO_USAGE,
            "parameters": parameters_response(self.request).model_dump(),
            "fingerprint": finished.fingerprint,
            "timings": asdict(finished.timings),
        }
        if self.ignored_fields:
            data["ignored_fields"] = self.ignored_fields
        if finished.cut_prompts:
            data["prompt_truncated"] = truncation_response(finished.cut_prompts)
        return self._image_event("completed", index, image, data)

    def _image_event(
        self, kind: str, index: int, image: EncodedImage, data: dict[str, Any]
    ) -> bytes:
        name, request = f"{self.event_prefix}.{kind}", self.request
        common = {
            "type": name,
            "id": request.id,
            "created_at": int(time.time()),
            "image_index": index,
            "seed": image.seed,
            "size": image.size or request.final_size,
            "output_format": request.output_format.value,
            "quality": "auto",
            "background": "opaque",
        }
        return sse(name, common | data | self._prompt)

    def _error_event(self, error: Exception) -> bytes:
        if self.prompt_index is None:
            note_error(self.incoming.http.scope, error)
            detail: ErrorDetail = error_detail(error, self.request.id)
        else:
            detail = self.failure(error)
        return sse("error", {"type": "error", "error": detail.model_dump()} | self._prompt)

    def failure(self, error: Exception) -> PromptError:
        """Note why this prompt of several has no images, and return what is told of it."""
        detail = prompt_error(error, self.request.id)
        note_failure(self.incoming.http.scope, error)
        return detail

    @property
    def _prompt(self) -> dict[str, Any]:
        return {} if self.prompt_index is None else {"prompt_index": self.prompt_index}
