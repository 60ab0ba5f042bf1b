"""From a checked request to the response with its images: whole, or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Response

from stepserve.api.bodies.schemas import ImageRequestBase
from stepserve.api.dependencies import Incoming
from stepserve.api.errors import error_detail, note_error
from stepserve.api.exchange_context import exchange_context_of
from stepserve.api.http.connection import stream_while_connected, while_connected
from stepserve.api.images.events import KEEP_ALIVE, KEEP_ALIVE_S, EventStreamResponse, sse
from stepserve.api.images.responses import (
    ImageData,
    ImagesResponse,
    base64_of,
    images_response,
    parameters_response,
    truncation_response,
)
from stepserve.domain.errors import CancelledError
from stepserve.domain.events import EncodedImage, Event, Failed, Finished, Preview
from stepserve.domain.requests import GenerationRequest

NO_USAGE: dict[str, Any] = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""OpenAI's clients want to be told how many tokens an image took: none."""


@dataclass(frozen=True)
class ImageCall:
    """One call for images: how it came in, its body, and what is to be made.

    `ignored_fields` were sent and change nothing.
    `event_prefix` begins the names of streamed events: `image_generation` or `image_edit`.
    """

    incoming: Incoming
    body: ImageRequestBase
    generation: GenerationRequest
    ignored_fields: tuple[str, ...] = ()
    event_prefix: str = "image_generation"


async def respond_with_images(call: ImageCall, response: Response) -> ImagesResponse | Response:
    """Serve a call to its end, or begin to stream it. The client leaving cancels the work.

    Raises:
        StepserveError: there are no images.
    """
    exchange_context_of(call.incoming.http.scope).generation = call.generation
    if call.body.stream:
        return await _begin_stream(call)
    outcome = await while_connected(
        call.incoming.http.receive,
        call.incoming.backend.generate(call.generation),
        call.incoming.settings.request_timeout_s,
        call.incoming.stopped,
    )
    if isinstance(outcome, Failed):
        raise outcome.error
    exchange_context_of(call.incoming.http.scope).timings = outcome.timings
    response.headers["Server-Timing"] = outcome.timings.server_timing()
    data = [await _image_data(call, image) for image in outcome.images]
    return images_response(call.generation, outcome, data, call.ignored_fields)


async def _image_data(call: ImageCall, image: EncodedImage) -> ImageData:
    if image.content_filtered:
        return ImageData(seed=image.seed, content_filtered=True)
    if call.body.wants_urls:
        return ImageData(url=await call.incoming.link(image), seed=image.seed)
    return ImageData(b64_json=base64_of(image), seed=image.seed)


async def _begin_stream(call: ImageCall) -> Response:
    """Wait for the first event, so that a refusal still has a status of its own."""
    events = stream_while_connected(
        call.incoming.http.receive,
        call.incoming.backend.stream(call.generation),
        KEEP_ALIVE_S,
        call.incoming.settings.request_timeout_s,
        call.incoming.stopped,
    )
    try:
        first = await anext(events)
        while first is None:
            first = await anext(events)
        if isinstance(first, Failed):
            raise first.error
    except BaseException:
        await events.aclose()
        raise
    return EventStreamResponse(_stream(call, events))


async def _stream(
    call: ImageCall, events: AsyncGenerator[Event | None, None]
) -> AsyncIterator[bytes]:
    try:
        async with aclosing(events):
            async for event in events:
                async for chunk in _chunks(call, event):
                    yield chunk
    except CancelledError as error:
        # The client left: there is nobody to tell.
        note_error(call.incoming.http.scope, error)
    except Exception as error:
        # The response has begun, so that its status cannot tell any more.
        yield _error_event(call, error)


async def _chunks(call: ImageCall, event: Event | None) -> AsyncIterator[bytes]:
    match event:
        case None:
            yield KEEP_ALIVE
        case Preview(images=images):
            for index, image in enumerate(images):
                if not image.content_filtered:
                    yield _partial_event(call, event, index, image)
        case Finished(images=images, timings=timings):
            exchange_context_of(call.incoming.http.scope).timings = timings
            for index, image in enumerate(images):
                yield await _completed_event(call, event, index, image)
        case Failed(error=error):
            yield _error_event(call, error)


def _partial_event(call: ImageCall, preview: Preview, index: int, image: EncodedImage) -> bytes:
    name = f"{call.event_prefix}.partial_image"
    told = {
        "b64_json": base64_of(image),
        "partial_image_index": preview.index,
        "step": preview.step,
        "steps": preview.steps,
    }
    return sse(name, {"type": name, **_described(call, index, image), **told})


async def _completed_event(
    call: ImageCall, finished: Finished, index: int, image: EncodedImage
) -> bytes:
    name = f"{call.event_prefix}.completed"
    data = await _image_data(call, image)
    told = {
        **data.model_dump(exclude_none=True),
        "usage": NO_USAGE,
        "parameters": parameters_response(call.generation).model_dump(),
        "fingerprint": finished.fingerprint,
        "timings": asdict(finished.timings),
    }
    if call.ignored_fields:
        told["ignored_fields"] = call.ignored_fields
    if finished.cut_prompts:
        told["prompt_truncated"] = truncation_response(finished.cut_prompts)
    return sse(name, {"type": name, **_described(call, index, image), **told})


def _described(call: ImageCall, index: int, image: EncodedImage) -> dict[str, Any]:
    generation = call.generation
    return {
        "id": generation.id,
        "created_at": int(time.time()),
        "image_index": index,
        "seed": image.seed,
        "size": f"{generation.width}x{generation.height}",
        "output_format": generation.output_format.value,
        "quality": "auto",
        "background": "opaque",
    }


def _error_event(call: ImageCall, error: Exception) -> bytes:
    note_error(call.incoming.http.scope, error)
    detail = error_detail(error, call.generation.id).model_dump()
    return sse("error", {"type": "error", "error": detail})
