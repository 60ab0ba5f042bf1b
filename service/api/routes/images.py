"""`POST /v1/images/generations`."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from service.api.answers import ImagesAnswer, images_answer
from service.api.connection import while_connected
from service.api.dependencies import (
    BackendDep,
    GenerationId,
    SettingsDep,
    find_model,
    require_json,
    require_ready,
)
from service.api.errors import MalformedJsonError, RequestTimedOutError, UnsupportedMediaTypeError
from service.api.openapi import REQUEST_ID, REQUEST_ID_PARAMETER, SERVER_TIMING, error_responses
from service.api.schemas import ImageRequest
from service.domain.errors import (
    BodyTooLargeError,
    GenerationFailedError,
    InvalidRequestError,
    NotReadyError,
    ServerFullError,
    UnknownModelError,
)
from service.domain.events import Failed, Finished, Outcome
from service.domain.limits import check_request

router = APIRouter(tags=["images"])

_ERRORS = error_responses(
    InvalidRequestError,
    MalformedJsonError,
    UnknownModelError,
    BodyTooLargeError,
    UnsupportedMediaTypeError,
    ServerFullError,
    GenerationFailedError,
    NotReadyError,
    RequestTimedOutError,
)


@router.post(
    "/v1/images/generations",
    summary="Make pictures from a prompt",
    dependencies=[Depends(require_json)],
    response_description="The pictures, and all parameters that make them again.",
    responses=_ERRORS | {200: {"headers": REQUEST_ID | SERVER_TIMING}},
    openapi_extra={"parameters": [REQUEST_ID_PARAMETER]},
)
async def create_images(
    body: ImageRequest,
    request: Request,
    response: Response,
    backend: BackendDep,
    settings: SettingsDep,
    generation_id: GenerationId,
) -> ImagesAnswer:
    """Compatible with OpenAI's `images.generate`. Closing the connection cancels the work."""
    model_id = settings.default_model if body.model is None else body.model
    model = await find_model(backend, model_id)
    generation = body.to_generation(generation_id, model.capabilities)
    check_request(generation, model.capabilities)
    require_ready([model])
    outcome = await while_connected(
        request.receive, backend.generate(generation), settings.request_timeout_s
    )
    finished = _succeeded(outcome)
    response.headers["Server-Timing"] = finished.timings.server_timing()
    return images_answer(generation, finished)


def _succeeded(outcome: Outcome) -> Finished:
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome
