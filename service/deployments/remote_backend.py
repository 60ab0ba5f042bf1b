"""The API's backend over Ray Serve handles: one handle a model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from service.api.backend import ModelStatus
from service.domain.errors import NotReadyError, ServerFullError
from service.domain.events import Outcome
from service.domain.models import ModelCapabilities, SizeRange
from service.domain.requests import GenerationRequest

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 10.0
FIRST_PROBE_TIMEOUT_S = 1.0
RETRY_AFTER_S = 3.0


class RemoteBackend:
    """Sends requests to model replicas, and keeps an eye on whether they answer.

    Args:
        handles: Ray Serve deployment handles by model id.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self._statuses = {model_id: _unknown(model_id) for model_id in handles}
        self._probes: dict[str, asyncio.Task[None]] = {}

    async def models(self) -> Sequence[ModelStatus]:
        """The latest status of every model; the first call waits briefly for a first answer."""
        if not self._probes:
            await self._start_probes()
        return list(self._statuses.values())

    async def generate(self, request: GenerationRequest) -> Outcome:
        """Serve a request on some replica of its model; cancelling this call cancels it there.

        Raises:
            NotReadyError: no replica could take it, or the replica died while working on it.
            ServerFullError: Ray Serve's own queue in front of the replicas is full.
        """
        try:
            outcome: Outcome = await self._handles[request.model].generate.remote(request)
        except BackPressureError as error:
            raise ServerFullError(
                "the queue in front of the model is full", RETRY_AFTER_S
            ) from error
        except (RayError, RayServeException) as error:
            message = f"model {request.model} lost the replica that worked on this request"
            raise NotReadyError(message, RETRY_AFTER_S) from error
        return outcome

    async def _start_probes(self) -> None:
        for model_id in self._handles:
            self._probes[model_id] = asyncio.create_task(self._probe_for_ever(model_id))
        first = [asyncio.create_task(self._probe(m, FIRST_PROBE_TIMEOUT_S)) for m in self._handles]
        await asyncio.gather(*first)

    async def _probe_for_ever(self, model_id: str) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            await self._probe(model_id, PROBE_TIMEOUT_S)

    async def _probe(self, model_id: str, timeout_s: float) -> None:
        try:
            answer = self._handles[model_id].capabilities.remote()
            capabilities = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            self._mark_not_ready(model_id, "loading")
        except NotReadyError:
            # Ray raises what the replica raised as an error that is of both kinds.
            self._mark_not_ready(model_id, "draining")
        except (RayError, RayServeException) as error:
            self._mark_not_ready(model_id, f"unavailable: {type(error).__name__}")
        else:
            self._statuses[model_id] = ModelStatus(capabilities, ready=True)

    def _mark_not_ready(self, model_id: str, detail: str) -> None:
        known = self._statuses[model_id].capabilities
        self._statuses[model_id] = ModelStatus(known, ready=False, detail=detail)


def _unknown(model_id: str) -> ModelStatus:
    """A model that has not answered yet: its limits are not known before it is loaded."""
    capabilities = ModelCapabilities(
        id=model_id,
        description="loading",
        sizes=SizeRange(0, 0, 1, 0),
        schedulers=(),
        default_scheduler="",
    )
    return ModelStatus(capabilities, ready=False, detail="loading")
