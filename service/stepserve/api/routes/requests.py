"""`GET` and `DELETE /v1/requests/{id}`, and `GET /v1/requests/{id}/events`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from stepserve.api.dependencies import Incoming, IncomingDep
from stepserve.api.errors import RequestTimedOutError, error_detail
from stepserve.api.http.connection import merged, while_connected
from stepserve.api.images.events import KEEP_ALIVE_S, EventStreamResponse, sse
from stepserve.api.images.responses import (
    ProgressResponse,
    base64_of,
    progress_response,
    truncation_response,
)
from stepserve.api.openapi import error_responses, event_stream
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import (
    CancelledError,
    InvalidRequestError,
    StoppedError,
    UnknownRequestError,
)
from stepserve.domain.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.progress import Progress, progress_of_call
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import RequestKey

router = APIRouter(tags=["requests"])

POLL_S = 5.0
"""How long one question for news waits for a response."""

FORGOTTEN_AFTER_S = 10.0
"""How long a known request may be unknown, as between a lost replica and the next try."""

ASK_AGAIN_S = 0.5
"""When to ask again for one that is unknown just now."""

_EVENTS = "What happened, with the `id` of the request."
_EVENT_NAMES = ("accepted", "started", "step", "preview", "finished", "failed")

MAX_EVENT_NUMBER = 10**9


@router.get(
    "/v1/requests/{id}",
    summary="Progress of a request",
    responses=error_responses(UnknownRequestError),
)
async def show_request(id: str, incoming: IncomingDep) -> ProgressResponse:  # noqa: A002
    """Where a request stands, by its `X-Request-ID`, whichever replica works on it.

    Of a call with `prompts` all of them together, and each by itself.
    """
    return progress_response(*await _find(incoming, RequestKey(id, incoming.caller.name)))


@router.delete(
    "/v1/requests/{id}", summary="Cancel it", responses=error_responses(UnknownRequestError)
)
async def cancel_request(id: str, incoming: IncomingDep) -> ProgressResponse:  # noqa: A002
    """End a request at its next step; the request for its images ends with status 499.

    Of a call with `prompts` all that have not ended are.
    """
    key = RequestKey(id, incoming.caller.name)
    progress, prompts = await _find(incoming, key)
    if not prompts:
        return progress_response(await _cancel(incoming, progress))
    await _cancel_all(incoming, prompts)
    # Those whose call had only just begun may not have been there yet.
    await _cancel_all(incoming, await incoming.backend.prompts(key))
    return progress_response(*await _find(incoming, key))


@router.get(
    "/v1/requests/{id}/events",
    summary="Follow it",
    response_class=Response,
    responses=error_responses(UnknownRequestError, InvalidRequestError)
    | {
        200: {"description": "Server-sent events.", "content": event_stream(_EVENTS, *_EVENT_NAMES)}
    },
)
async def follow_request(
    id: str,  # noqa: A002
    incoming: IncomingDep,
    last_event_id: Annotated[
        str | None, Header(description="Number of the last event that was seen.")
    ] = None,
) -> Response:
    """What happened to a request from its acceptance on, and what happens, up to its end.

    Events: `accepted`, `started`, `step`, `preview`, `finished`, `failed`. A client that reconnects
    is sent what it has not seen. Those of a call with `prompts` are sent as they come, each with
    the `id` of its own request; one that reconnects to a call is sent all again.
    """
    key = RequestKey(id, incoming.caller.name)
    _, prompts = await _find(incoming, key)
    number = _number_after(last_event_id)
    events = while_connected(
        incoming.http.receive,
        _events_of_call(incoming, key, prompts) if prompts else _events(incoming, key, number),
        incoming.settings.http.request_timeout_s,
        incoming.stopped,
        KEEP_ALIVE_S,
    )
    write = _write_of_call if prompts else _write
    return EventStreamResponse[NumberedEvent](events, write, partial(_fail, id))


async def _find(incoming: Incoming, key: RequestKey) -> tuple[Progress, Sequence[Progress]]:
    """A request of the caller's, and of a call with several prompts also each one's.

    Another caller's is as unknown as one that never was.
    """
    progress = await incoming.backend.progress(key)
    if progress is not None:
        return progress, ()
    prompts = sorted(await incoming.backend.prompts(key), key=_prompt_index)
    if not prompts:
        raise UnknownRequestError(f"no request {shown(key.id)} is known", "id")
    return progress_of_call(key, prompts), prompts


def _prompt_index(progress: Progress) -> int:
    return progress.key.prompt_index or 0


async def _cancel_all(incoming: Incoming, prompts: Sequence[Progress]) -> None:
    await asyncio.gather(*(_cancel(incoming, prompt) for prompt in prompts))


async def _cancel(incoming: Incoming, progress: Progress) -> Progress:
    if progress.ended:
        return progress
    return await incoming.backend.cancel(progress.key) or progress


def _number_after(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 9:
        raise InvalidRequestError(
            f"Last-Event-ID must be 0 to {MAX_EVENT_NUMBER - 1}, got {shown(last_event_id)}",
            "Last-Event-ID",
        )
    return int(last_event_id) + 1


async def _events(
    incoming: Incoming, key: RequestKey, number: int
) -> AsyncGenerator[NumberedEvent, None]:
    """Events from `number` on, up to the last one. Ends as well where the request is forgotten."""
    clock = asyncio.get_running_loop().time
    known_s = clock()
    while clock() - known_s < FORGOTTEN_AFTER_S:
        events = await incoming.backend.events(key, number, POLL_S)
        if events is None:
            await asyncio.sleep(ASK_AGAIN_S)
            continue
        known_s = clock()
        for event in events:
            number = event.number + 1
            yield event
            if isinstance(event.event, Finished | Failed):
                return
        if not events and await _has_ended(incoming, key):
            return


async def _events_of_call(
    incoming: Incoming, call: RequestKey, prompts: Sequence[Progress]
) -> AsyncGenerator[NumberedEvent, None]:
    """What happened to the requests of a call, and what happens, up to the end of the last.

    Args:
        call: its name.
        prompts: those of its requests that are known; others may only just be on their way.
    """
    followed: set[RequestKey] = set()
    while new := [prompt.key for prompt in prompts if prompt.key not in followed]:
        followed.update(new)
        async with aclosing(merged([_events(incoming, key, 0) for key in new])) as events:
            async for _, event in events:
                yield event
        prompts = await incoming.backend.prompts(call)


async def _has_ended(incoming: Incoming, key: RequestKey) -> bool:
    """Whether there is nothing more to come, as when the client has seen everything."""
    progress = await incoming.backend.progress(key)
    return progress is not None and progress.ended


async def _write(numbered: NumberedEvent) -> list[bytes]:
    name, data = _describe(numbered.event)
    return [sse(name, {"id": numbered.event.request_id, **data}, numbered.number)]


async def _write_of_call(numbered: NumberedEvent) -> list[bytes]:
    """Without a number, as each prompt's request counts its own."""
    name, data = _describe(numbered.event)
    request_id = numbered.event.request_id
    index = RequestKey(request_id).prompt_index
    return [sse(name, {"id": request_id, "prompt_index": index, **data})]


def _fail(request_id: str, error: Exception) -> bytes | None:
    if isinstance(error, CancelledError | RequestTimedOutError):
        # The client left, or has followed for as long as it may: it can come again.
        return None
    if not isinstance(error, StoppedError):
        raise error
    # Without a number, as the server that numbers what happens has not sent it.
    detail = error_detail(error, request_id).model_dump()
    return sse("failed", {"id": request_id, "error": detail})


def _describe(event: Event) -> tuple[str, dict[str, Any]]:
    match event:
        case Accepted(position=position, expected_s=expected_s):
            return "accepted", {"position": position, "expected_s": expected_s}
        case Started():
            return "started", {}
        case StepFinished(step=step, steps=steps):
            return "step", {"step": step, "steps": steps}
        case Preview():
            return "preview", _describe_preview(event)
        case Finished(timings=timings):
            data: dict[str, Any] = {
                "seeds": [image.seed for image in event.images],
                "content_filtered": [
                    image.seed for image in event.images if image.content_filtered
                ],
                "timings": asdict(timings),
            }
            if event.cut_prompts:
                data["prompt_truncated"] = truncation_response(event.cut_prompts)
            return "finished", data
        case Failed(error=error):
            return "failed", {"error": error_detail(error, event.request_id).model_dump()}


def _describe_preview(preview: Preview) -> dict[str, Any]:
    return {
        "index": preview.index,
        "step": preview.step,
        "steps": preview.steps,
        "images": [
            {"b64_json": base64_of(image), "media_type": image.media_type}
            for image in preview.images
            if not image.content_filtered
        ],
    }
