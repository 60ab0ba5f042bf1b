"""`GET /metrics`: the whole application's metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from stepserve.api.errors import UnknownRouteError
from stepserve.telemetry.exposition import CONTENT_TYPE

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics of all processes of all nodes, in Prometheus' text format.

    Raises:
        UnknownRouteError: this service shows none.
    """
    read = request.app.state.observation.read_metrics
    if read is None:
        raise UnknownRouteError("this service exposes no metrics (telemetry.metrics is off)")
    return Response(await read(), media_type=CONTENT_TYPE)
