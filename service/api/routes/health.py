"""`GET /healthz` and `GET /readyz`, for probes."""

from __future__ import annotations

from fastapi import APIRouter

from service import __version__
from service.api.answers import HealthAnswer, ReadyAnswer
from service.api.dependencies import BackendDep, require_ready
from service.api.openapi import error_responses
from service.domain.errors import NotReadyError

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process up?", responses=error_responses())
async def healthz() -> HealthAnswer:
    """Depends on nothing else, so that a slow model never gets this process restarted."""
    return HealthAnswer(version=__version__)


@router.get(
    "/readyz", summary="Do all models take requests?", responses=error_responses(NotReadyError)
)
async def readyz(backend: BackendDep) -> ReadyAnswer:
    """Answers 503 until every model is ready; the message tells which are not, and why."""
    statuses = list(await backend.models())
    require_ready(statuses)
    return ReadyAnswer(models=[status.capabilities.id for status in statuses])
