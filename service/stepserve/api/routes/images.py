"""`POST /v1/images/generations`, `/edits`, `/variations` and `/upscale`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Response

from stepserve.api.bodies.fields import ignored_queries
from stepserve.api.bodies.schemas import (
    EditRequest,
    ImageRequest,
    ImageRequestBase,
    UpscaleRequest,
    VariationRequest,
)
from stepserve.api.dependencies import (
    Incoming,
    IncomingDep,
    find_model,
    require_ready,
)
from stepserve.api.errors import (
    MalformedFormError,
    MalformedJsonError,
    RequestTimedOutError,
    UnsupportedMediaTypeError,
)
from stepserve.api.exchange_context import exchange_context_of
from stepserve.api.images.generation import ImageResponder
from stepserve.api.images.inputs import Sent, read_inputs, read_sent
from stepserve.api.images.prompts import PromptsResponder, check_any, split_call
from stepserve.api.images.purposes import EDITS, GENERATIONS, UPSCALES, VARIATIONS, Purpose
from stepserve.api.images.responses import ImagesResponse
from stepserve.api.images.slots import Body
from stepserve.api.observe.exchanges import trace_context_of
from stepserve.api.openapi import (
    REQUEST_ID,
    REQUEST_ID_PARAMETER,
    SERVER_TIMING,
    Responses,
    error_responses,
    event_stream,
    form_or_json,
)
from stepserve.api.results.space import ResultsUnavailableError, needed_bytes
from stepserve.domain.errors import (
    BodyTooLargeError,
    ContentFilteredError,
    ExpiredError,
    GenerationFailedError,
    InvalidRequestError,
    NotReadyError,
    RequestIdInUseError,
    ServerFullError,
    UnknownModelError,
    UnmeetableDeadlineError,
)
from stepserve.domain.model_status import ModelStatus

router = APIRouter(tags=["images"])

_ERRORS = error_responses(
    InvalidRequestError,
    MalformedJsonError,
    UnknownModelError,
    RequestIdInUseError,
    BodyTooLargeError,
    UnsupportedMediaTypeError,
    ServerFullError,
    UnmeetableDeadlineError,
    ContentFilteredError,
    GenerationFailedError,
    NotReadyError,
    ResultsUnavailableError,
    ExpiredError,
    RequestTimedOutError,
)


def _responses(prefix: str) -> Responses:
    names = f"{prefix}.partial_image", f"{prefix}.completed", "error"
    stream = event_stream("With `stream`: partial images, then the finished ones.", *names)
    return {200: {"headers": REQUEST_ID | SERVER_TIMING, "content": stream}}


@router.post(
    "/v1/images/generations",
    summary="Make images from a prompt",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    response_description="The images, and all parameters that make them again.",
    responses=_ERRORS | _responses("image_generation"),
    openapi_extra={
        "parameters": [REQUEST_ID_PARAMETER],
        "requestBody": form_or_json(ImageRequest, ()),
    },
)
async def create_images(incoming: IncomingDep, response: Response) -> ImagesResponse | Response:
    """Compatible with OpenAI's `images.generate`. Closing the connection cancels the work."""
    sent = await read_sent(incoming, ImageRequest)
    sent.body.check_prompts()
    return await _respond(incoming, sent, GENERATIONS, response, sent.body.prompts)


@router.post(
    "/v1/images/edits",
    summary="Change an image, or repaint a part of it",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    response_description="The images, and all parameters that shaped them.",
    responses=_ERRORS | error_responses(MalformedFormError) | _responses("image_edit"),
    openapi_extra={
        "parameters": [REQUEST_ID_PARAMETER],
        "requestBody": form_or_json(EditRequest, ("image", "mask")),
    },
)
async def edit_image(incoming: IncomingDep, response: Response) -> ImagesResponse | Response:
    """Compatible with OpenAI's `images.edit`.

    With a mask, only what is transparent in it is repainted (or white, where it has no
    transparency). Without one the whole image is changed, by as much as `strength` says.
    """
    sent = await read_sent(incoming, EditRequest)
    return await _respond(incoming, sent, EDITS, response)


@router.post(
    "/v1/images/variations",
    summary="Make images like one that is given",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    response_description="The images, and all parameters that shaped them.",
    responses=_ERRORS | error_responses(MalformedFormError) | _responses("image_variation"),
    openapi_extra={
        "parameters": [REQUEST_ID_PARAMETER],
        "requestBody": form_or_json(VariationRequest, ("image",)),
    },
)
async def vary_image(incoming: IncomingDep, response: Response) -> ImagesResponse | Response:
    """Compatible with OpenAI's `images.create_variation`: image-to-image without a prompt."""
    sent = await read_sent(incoming, VariationRequest)
    return await _respond(incoming, sent, VARIATIONS, response)


@router.post(
    "/v1/images/upscale",
    summary="Make an image larger",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    response_description="The images, and all parameters that shaped them.",
    responses=_ERRORS | error_responses(MalformedFormError) | _responses("image_upscale"),
    openapi_extra={
        "parameters": [REQUEST_ID_PARAMETER],
        "requestBody": form_or_json(UpscaleRequest, ("image",)),
    },
)
async def upscale_image(incoming: IncomingDep, response: Response) -> ImagesResponse | Response:
    """As many times larger as the model makes it: for models whose task is `upscaling`."""
    sent = await read_sent(incoming, UpscaleRequest)
    return await _respond(incoming, sent, UPSCALES, response)


async def _chosen_model(incoming: Incoming, body: ImageRequestBase) -> ModelStatus:
    default = incoming.settings.default_model
    model = await find_model(incoming.backend, default if body.model is None else body.model)
    exchange_context_of(incoming.http.scope).model = model.capabilities.id
    return model


async def _respond(
    incoming: Incoming,
    sent: Sent[Body],
    purpose: Purpose,
    response: Response,
    prompts: Sequence[str] | None = None,
) -> ImagesResponse | Response:
    """Serve the request if the model can do what is wanted, and is there.

    Args:
        prompts: the request is one for each of them.
    """
    body = sent.body
    model = await _chosen_model(incoming, body)
    if not model.is_known:
        require_ready([model])
    task = purpose.task_for(model.capabilities, sent.given(), prompts is not None)
    inputs = await read_inputs(incoming, sent)
    request = inputs.to_generation(incoming.request_id, incoming.caller, model.capabilities, task)
    traced = replace(request, trace_context=trace_context_of(incoming.http.scope))
    requests = (traced,) if prompts is None else split_call(traced, prompts)
    check_any(requests, model.capabilities)
    require_ready([model])
    if body.wants_urls:
        await incoming.store.check(sum(map(needed_bytes, requests)))
    in_body = body.ignored_fields(
        request.guidance_scale, model.capabilities.guidance, model.capabilities.previews
    )
    in_query = ignored_queries(incoming.http.query_params, type(body))
    ignored = tuple(dict.fromkeys((*in_body, *in_query)))
    one = ImageResponder(incoming, traced, body.wants_urls, ignored, purpose.event_prefix)
    responder: ImageResponder | PromptsResponder = one
    if prompts is not None:
        each = (replace(one, request=r, prompt_index=i) for i, r in enumerate(requests))
        responder = PromptsResponder(model.capabilities, traced, tuple(each))
    return await (responder.stream() if body.stream else responder.whole(response))
