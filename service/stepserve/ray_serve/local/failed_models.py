"""Which models could not be loaded, as Ray Serve and their replicas tell at this moment."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from stepserve.domain.model_status import ModelStatus
from stepserve.ray_serve.applications import applications, listed, model_application, model_handle

ASK_TIMEOUT_S = 5.0


def failed_models(model_ids: Collection[str]) -> list[str]:
    """Those of the models that could not be loaded; none that still loads, or sleeps."""
    if not model_ids:
        return []
    found = applications()
    return [
        model_id
        for model_id in model_ids
        if failure_of(found.get(model_application(model_id))) or _says_so(model_id)
    ]


def failure_of(application: ApplicationStatusOverview | None) -> str:
    """Why Ray Serve gave an application up, for whoever started it; empty where it did not."""
    status = None if application is None else listed(application)
    return f"{status.failure} ({status.cause})" if status is not None and status.failure else ""


def _says_so(model_id: str) -> bool:
    replies: Sequence[Any] = ()
    # Without a replica there is nobody to ask, and one that sleeps is not to be woken.
    with contextlib.suppress(TimeoutError, RayError, RayServeException):
        asking = model_handle(model_id).broadcast("status")
        replies = asking.results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    return any(isinstance(told, ModelStatus) and not told.ready for told in replies)
