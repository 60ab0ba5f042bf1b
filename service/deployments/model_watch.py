"""What an ingress replica knows of the models: whether each answers, and what it can do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from service.api.backend import ModelStatus
from service.domain.errors import NotReadyError
from service.domain.models import ModelCapabilities, SizeRange

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 10.0
FIRST_LOOK_TIMEOUT_S = 1.0

Probe = Callable[[], Awaitable[ModelCapabilities]]


class ModelWatch:
    """Asks every model again and again what it can do; the latest answers are its statuses.

    Args:
        probes: asks a model, by its id. One that still loads does not answer before it is ready.
    """

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self._probes = dict(probes)
        self._statuses = {model_id: _unknown(model_id) for model_id in probes}
        self._answered: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to ask, and wait briefly: who is there already is known before anybody calls."""
        self._answered = {model_id: asyncio.Event() for model_id in self._probes}
        self._tasks = [asyncio.create_task(self._watch(model_id)) for model_id in self._probes]
        await asyncio.gather(*map(self.status, self._probes))

    def statuses(self) -> list[ModelStatus]:
        """The latest status of every model."""
        return list(self._statuses.values())

    async def status(self, model_id: str) -> ModelStatus | None:
        """The latest status of one model, after a brief wait if it has never answered.

        A model may be ready for moments before every ingress replica knows. None: no such model.
        """
        answered = self._answered.get(model_id)
        if answered is not None and not answered.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answered.wait(), FIRST_LOOK_TIMEOUT_S)
        return self._statuses.get(model_id)

    async def _watch(self, model_id: str) -> None:
        while True:
            # One that took its time has waited already: no moment goes by unasked while it loads.
            if await self._ask(model_id):
                await asyncio.sleep(PROBE_INTERVAL_S)

    async def _ask(self, model_id: str) -> bool:
        """Whether the model said anything in time."""
        try:
            capabilities = await asyncio.wait_for(self._probes[model_id](), PROBE_TIMEOUT_S)
        except TimeoutError:
            self._mark_not_ready(model_id, "loading")
            return False
        except NotReadyError:
            # Ray raises what the replica raised as an error that is of both kinds.
            self._mark_not_ready(model_id, "draining")
        except (RayError, RayServeException) as error:
            self._mark_not_ready(model_id, f"unavailable: {type(error).__name__}")
        else:
            self._statuses[model_id] = ModelStatus(capabilities, ready=True)
            self._answered[model_id].set()
        return True

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
