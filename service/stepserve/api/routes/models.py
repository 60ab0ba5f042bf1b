"""`GET /v1/models`, `/v1/models/{id}` and `/v1/models/{id}/batch`; an alias is as good as an id."""

from __future__ import annotations

from fastapi import APIRouter

from stepserve.api.dependencies import IncomingDep, find_model
from stepserve.api.images.responses import (
    BatchResponse,
    ModelList,
    ModelResponse,
    model_response,
)
from stepserve.api.openapi import error_responses
from stepserve.domain.errors import UnknownModelError

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List models", responses=error_responses())
async def list_models(incoming: IncomingDep) -> ModelList:
    """Every served model with its limits and defaults, also those that are still loading."""
    return ModelList(data=[model_response(status) for status in await incoming.backend.models()])


@router.get(
    "/v1/models/{id}", summary="Show one model", responses=error_responses(UnknownModelError)
)
async def show_model(id: str, incoming: IncomingDep) -> ModelResponse:  # noqa: A002
    """One model with its limits and defaults."""
    return model_response(await find_model(incoming.backend, id))


@router.get(
    "/v1/models/{id}/batch",
    summary="Watch the running batch",
    responses=error_responses(UnknownModelError),
)
async def show_batch(id: str, incoming: IncomingDep) -> BatchResponse:  # noqa: A002
    """Which requests each replica has in flight, and which of them shared its latest forwards."""
    model_id = (await find_model(incoming.backend, id)).capabilities.id
    views = await incoming.backend.batch(model_id, incoming.caller.name)
    return BatchResponse(model=model_id, replicas=list(views))
