"""A model replica: one resident pipeline behind one engine, as a Ray Serve deployment.

Torch and diffusers are imported on the replica only, so that the driver starts fast.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepserve.config import ModelSettings, TelemetrySettings
from stepserve.domain.errors import NotReadyError, StepserveError
from stepserve.domain.events import Event, Failed
from stepserve.domain.model_status import ModelStatus, unknown_status
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.garbage import collection_paused
from stepserve.models.catalogue import ModelNotFoundError
from stepserve.ray_serve.autoscaling import BACKLOG
from stepserve.ray_serve.heap import TRIM_INTERVAL_S, heap_trimmer
from stepserve.ray_serve.replica.load_attempts import LoadAttempts, folder_state
from stepserve.ray_serve.replica.metrics import ReplicaMetrics, open_request_traces
from stepserve.ray_serve.replica.request_tracker import RequestTracker
from stepserve.ray_serve.replica.watchdog import watch_interpreter, watch_work
from stepserve.ray_serve.replica_port import listen_on_node_address
from stepserve.telemetry.flusher import Flusher
from stepserve.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from stepserve.pipelines.serving.runner import PipelineRunner

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class ServingModel:
    """What there is once a model is loaded, warm and served.

    Args:
        load_s: seconds that it took.
    """

    runner: PipelineRunner
    tracker: RequestTracker
    metrics: ReplicaMetrics
    load_s: float


class ModelReplica:
    """Serves requests for one model, each up to its end; cancelling the call cancels the request.

    One whose model cannot be loaded stays, says why, and tries again now and then.
    """

    def __init__(
        self, model_id: str, settings: ModelSettings, telemetry: TelemetrySettings
    ) -> None:
        listen_on_node_address()
        self._model_id = model_id
        self._settings = settings
        self._draining = False
        self._attempts = LoadAttempts(partial(folder_state, _own_folder(settings)), time.monotonic)
        # Other threads than the one that loads it look here.
        self._model: ServingModel | None = None
        set_up_logging(telemetry.log_format, telemetry.log_level)
        if not self._load():
            threading.Thread(target=self._load_again, name="load", daemon=True).start()

    def _load(self) -> bool:
        """Load the model, and be ready to serve it; False if it cannot be loaded."""
        with collection_paused():
            from stepserve.composition import load_runner

        began_s = time.monotonic()
        self._attempts.begin()
        try:
            runner = load_runner(self._model_id, self._settings)
        except Exception as error:
            self._note_failure(error)
            return False
        self._model = self._serve(runner, time.monotonic() - began_s)
        self._attempts.succeeded()
        return True

    def _note_failure(self, error: Exception) -> None:
        from stepserve.pipelines.loading.reasons import NO_FOLDER, reason_of

        missing = isinstance(error, ModelNotFoundError)
        self._attempts.failed(NO_FOLDER if missing else reason_of(error))
        ours = isinstance(error, StepserveError)
        logger.error(
            "model %s cannot be loaded: %s; %s",
            self._model_id,
            error if ours else f"{type(error).__name__}: {error}",
            self._attempts.next_try,
            exc_info=None if ours else error,
        )

    def _load_again(self) -> None:
        while not self._draining:
            time.sleep(LOOK_AGAIN_S)
            if self._attempts.is_due() and not self._draining:
                # What the try before has left behind.
                gc.collect()
                if self._load():
                    return

    def _serve(self, runner: PipelineRunner, load_s: float) -> ServingModel:
        logger.info("model %s is ready after %.1f s", self._model_id, load_s)
        traces = open_request_traces()
        metrics = ReplicaMetrics(runner, self._model_id, load_s, traces)
        metrics.start()
        if (trim := heap_trimmer()) is not None:
            Flusher(trim, TRIM_INTERVAL_S, "heap").start()
        stuck_after_s = self._settings.engine.stuck_after_s
        watch_interpreter(stuck_after_s)
        # One that drained has no engine any more.
        watch_work(lambda: 0.0 if self._draining else runner.engine.silent_s(), stuck_after_s)
        return ServingModel(runner, RequestTracker(runner, traces), metrics, load_s)

    async def status(self, ingress: str = "") -> ModelStatus:
        """What the model can do, and whether it takes requests. It replies once it is warm.

        An ingress asks every second, which is its heartbeat.
        """
        aliases = self._settings.aliases
        if (model := self._model) is None:
            return unknown_status(self._model_id, self._attempts.failure, aliases)
        if ingress:
            model.tracker.hear(ingress)
        capabilities = replace(
            model.runner.capabilities(), load_s=round(model.load_s, 1), aliases=aliases
        )
        if self._draining:
            return ModelStatus(capabilities, ready=False, detail="draining")
        return ModelStatus(capabilities, ready=True)

    async def submit(
        self, request: GenerationRequest, ingress: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Serve a request; its events follow, up to its end. See `RequestTracker.submit`.

        Errors are events too, as they cross processes.
        """
        if self._model is None:
            return self._refuse(request)
        return self._model.tracker.submit(request, ingress)

    async def _refuse(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        message = f"model {self._model_id} {self._attempts.failure}"
        yield Failed(request.id, NotReadyError(message, self._attempts.retry_after_s))

    async def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands, or None if its owner has none of that id here."""
        return None if self._model is None else self._model.tracker.progress(key)

    async def prompts(self, call: RequestKey) -> Sequence[Progress]:
        """Where the requests for the prompts of a call stand that are here; none of other calls."""
        return () if self._model is None else self._model.tracker.prompts(call)

    async def cancel(self, key: RequestKey) -> Progress | None:
        """End a request at its next step; None if its owner has none of that id here."""
        return None if self._model is None else self._model.tracker.cancel(key)

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """The events of a request from `number` on, as soon as there are any, or after `wait_s`.

        None if its owner has none of that id here.
        """
        return (
            None if self._model is None else await self._model.tracker.events(key, number, wait_s)
        )

    async def batch(self, owner: str) -> BatchView | None:
        """The engine's batch as `owner` may see it; None where there is no engine."""
        return None if self._model is None else self._model.runner.engine.batcher.view(owner)

    async def drain(self) -> None:
        """Refuse new requests, and return when those in flight have ended."""
        self._draining = True
        if (model := self._model) is None:
            return
        drain_s = self._settings.engine.drain_s
        in_flight = model.runner.engine.load().requests
        logger.info("draining: %d requests in flight get up to %.0f s", in_flight, drain_s)
        await asyncio.to_thread(model.runner.stop, drain_s)
        # Sending the last spans may take seconds, and those that were cut off wait for a response.
        await asyncio.to_thread(model.metrics.stop)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve, which passes it to the routers."""
        return {} if self._model is None else self._model.tracker.report().to_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, which hands it to the policy."""
        model = self._model
        return {BACKLOG: 0.0 if model is None else model.runner.engine.load().backlog_s}

    async def check_health(self) -> None:
        """Called by Ray Serve every now and then."""
        if self._model is not None:
            self._model.tracker.cancel_orphans()


def _own_folder(settings: ModelSettings) -> Path | None:
    """Where the model lies, if that is not the embedded model's folder or a hub."""
    return None if settings.path is None or settings.revision else Path(settings.path)
