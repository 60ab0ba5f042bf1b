"""A model replica: one resident pipeline behind one engine, as a Ray Serve deployment.

Torch and diffusers are imported on the replica only, so that the driver starts fast.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.config import EngineSettings, ModelSettings, TelemetrySettings
from service.deployments.observing import start_logging
from service.deployments.replica_metrics import ReplicaMetrics
from service.deployments.request_desk import RequestDesk
from service.domain.batch import BatchView
from service.domain.errors import NotReadyError, RequestIdInUseError, UnknownModelError
from service.domain.events import Event, Failed, Finished, Outcome
from service.domain.models import ModelCapabilities
from service.domain.progress import Progress
from service.domain.request_log import NumberedEvent
from service.domain.requests import GenerationRequest

if TYPE_CHECKING:
    from service.engine.engine import EngineOptions
    from service.pipelines.adapter_files import AdapterOptions
    from service.pipelines.runner import PipelineRunner
    from service.pipelines.trust import Trust

logger = logging.getLogger(__name__)

# A forward never takes this long on any machine worth serving from; a hung one does.
STUCK_AFTER_S = 300.0
DRAIN_RETRY_S = 5.0


class ReplicaStuckError(RuntimeError):
    """The engine shows no sign of life: Ray Serve should replace this replica."""


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is to load, and how."""

    model_id: str
    folder: Path
    settings: ModelSettings
    telemetry: TelemetrySettings


class ModelReplica:
    """Answers each request with its outcome; cancelling the call cancels the request."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        start_logging(spec.telemetry)
        started_s = time.monotonic()
        self.runner = _load_runner(spec)
        self.metrics = ReplicaMetrics(self.runner, spec.model_id, time.monotonic() - started_s)
        self.metrics.start()
        self.desk = RequestDesk(self.runner)
        self._draining = False

    async def capabilities(self) -> ModelCapabilities:
        """What the model can do. Answered only once the replica is warm.

        Raises:
            NotReadyError: it takes no new work any more.
        """
        if self._draining:
            raise NotReadyError("draining", DRAIN_RETRY_S)
        return self.runner.capabilities()

    async def generate(self, request: GenerationRequest) -> Outcome:
        """Serve a request to its end. Errors are returned, not raised: they cross processes."""
        outcome: Outcome | None = None
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, Finished | Failed):
                    outcome = event
        assert outcome is not None
        return outcome

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Serve a request, and tell what happens to it, up to its end.

        Closing the stream, or cancelling whoever reads it, cancels the request.
        """
        if request.model != self.spec.model_id:
            error = UnknownModelError(f"this replica serves {self.spec.model_id}", "model")
            yield Failed(request.id, error)
            return
        try:
            events = await self.desk.submit(request)
        except RequestIdInUseError as error:
            yield Failed(request.id, error)
            return
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self.desk.give_up(request.id)

    async def progress(self, request_id: str) -> Progress | None:
        """Where a request stands, or None if this replica does not know it."""
        return self.desk.progress(request_id)

    async def cancel(self, request_id: str) -> Progress | None:
        """End a request at its next step; None if this replica does not know it."""
        self.desk.give_up(request_id)
        return self.desk.progress(request_id)

    async def events(
        self, request_id: str, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """The events of a request from `number` on, as soon as there are any, or after `wait_s`.

        None if this replica does not know it.
        """
        return await self.desk.events(request_id, number, wait_s)

    async def batch(self) -> BatchView:
        """What the engine has in hand, and its latest forwards."""
        return self.runner.view()

    async def drain(self) -> None:
        """Refuse new work and return when what is in hand has ended."""
        self._draining = True
        drain_s = self.spec.settings.engine.drain_s
        await asyncio.get_running_loop().run_in_executor(None, self.runner.stop, drain_s)
        self.metrics.stop()

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            ReplicaStuckError: the engine died, or a forward hangs.
        """
        silent_s = self.runner.engine.silent_s()
        if silent_s > STUCK_AFTER_S:
            raise ReplicaStuckError(f"the engine has been silent for {silent_s:.0f} s")


def _load_runner(spec: ReplicaSpec) -> PipelineRunner:
    from service.pipelines.load import leave_cores_to_engine, load_model
    from service.pipelines.runner import PipelineRunner, SharingOptions
    from service.pipelines.warm_up import warm_up

    settings = spec.settings
    leave_cores_to_engine()
    model = load_model(
        spec.model_id,
        spec.folder,
        settings.dtype,
        settings.device,
        settings,
        trust_of(settings),
    )
    sharing = SharingOptions(settings.engine.fixed_rows, settings.prompt_cache_bytes)
    adapters = adapter_options(settings)
    runner = PipelineRunner(model, engine_options(settings.engine), adapters, sharing)
    runner.start()
    seconds = warm_up(runner)
    logger.info("model %s is warm after %.1f s", spec.model_id, seconds)
    runner.start_compiling()
    return runner


def trust_of(settings: ModelSettings) -> Trust:
    """What an operator allows a model's folder."""
    from service.pipelines.trust import Trust

    return Trust(remote_code=settings.trust_remote_code, pickle=settings.allow_pickle)


def adapter_options(settings: ModelSettings) -> AdapterOptions:
    """Where the adapters of a model are, from an operator's settings."""
    from service.pipelines.adapter_files import AdapterOptions

    return AdapterOptions(
        named={name: Path(path) for name, path in settings.adapters.items()},
        folder=Path(settings.adapters_folder) if settings.adapters_folder else None,
        max_loaded=settings.max_loaded_adapters,
    )


def engine_options(settings: EngineSettings) -> EngineOptions:
    """The engine's options from an operator's settings."""
    from service.engine.engine import EngineOptions

    return EngineOptions(
        max_rows=settings.max_rows,
        max_waiting_pictures=settings.max_waiting_pictures,
        # Said in so many words, as Ray sets torch's default by the CPUs that a replica reserves.
        threads=settings.threads or os.cpu_count(),
        niceness=settings.niceness,
        gradients=settings.gradients,
    )
