"""`GET /healthz` and `GET /readyz`, for probes."""

from __future__ import annotations

from fastapi import APIRouter

from stepserve import __version__
from stepserve.api.dependencies import NO_REASON, IncomingDep, require_ready
from stepserve.api.images.responses import HealthResponse, ReadyResponse
from stepserve.api.openapi import error_responses
from stepserve.api.results.space import ResultsUnavailableError
from stepserve.api.results.store import ResultStore
from stepserve.domain.errors import NotReadyError

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process up?", responses=error_responses())
async def healthz() -> HealthResponse:
    """Depends on nothing else, so that a slow model never gets this process restarted."""
    return HealthResponse(version=__version__)


@router.get(
    "/readyz", summary="Does any model take requests?", responses=error_responses(NotReadyError)
)
async def readyz(incoming: IncomingDep) -> ReadyResponse:
    """Answers 503 while no model is ready; the message tells why.

    A model that is added, or cannot be loaded, keeps nobody from the others.
    """
    statuses = list(await incoming.backend.models())
    ready = [status.capabilities.id for status in statuses if status.ready]
    if not ready:
        require_ready(statuses)
    details = {s.capabilities.id: s.detail or NO_REASON for s in statuses if not s.ready}
    results = await _trouble_with(incoming.store)
    return ReadyResponse(models=ready, not_ready=details, results=results)


async def _trouble_with(store: ResultStore) -> str:
    """Images that are answered as they are need no store: this keeps nobody from the models."""
    try:
        await store.check()
    except ResultsUnavailableError as error:
        return error.message
    return ""
