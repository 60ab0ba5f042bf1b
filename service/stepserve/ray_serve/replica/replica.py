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
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepserve.config import ModelSettings, TelemetrySettings
from stepserve.domain.batch import BatchView
from stepserve.domain.errors import (
    NotReadyError,
    RequestIdInUseError,
    StepserveError,
    StoppedError,
)
from stepserve.domain.events import Event, Failed, Finished, Outcome
from stepserve.domain.model_status import ModelStatus, unknown_status
from stepserve.domain.progress import Progress
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.garbage import collection_paused
from stepserve.models.catalogue import ModelNotFoundError
from stepserve.ray_serve.autoscaling import BACKLOG
from stepserve.ray_serve.heap import TRIM_INTERVAL_S, heap_trimmer
from stepserve.ray_serve.logging import start_logging
from stepserve.ray_serve.replica.heartbeats import IngressHeartbeats
from stepserve.ray_serve.replica.load_attempts import LoadAttempts, folder_state
from stepserve.ray_serve.replica.metrics import ReplicaMetrics, open_request_traces
from stepserve.ray_serve.replica.request_tracker import NOT_WATCHED, RequestTracker
from stepserve.ray_serve.replica.watchdog import watch_interpreter, watch_work
from stepserve.ray_serve.replica_port import listen_on_node_address
from stepserve.telemetry.flusher import Flusher

if TYPE_CHECKING:
    from stepserve.pipelines.serving.runner import PipelineRunner

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is to load, and how."""

    model_id: str
    settings: ModelSettings
    telemetry: TelemetrySettings


class ModelReplica:
    """Answers each request with its outcome; cancelling the call cancels the request.

    One whose model cannot be loaded stays, tells why, and tries again now and then.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        listen_on_node_address()
        self.spec = spec
        self.callers = IngressHeartbeats(time.monotonic)
        self._draining = False
        self._orphaned: set[RequestKey] = set()
        self._attempts = LoadAttempts(partial(folder_state, _own_folder(spec)), time.monotonic)
        start_logging(spec.telemetry)
        if not self._load():
            threading.Thread(target=self._load_again, name="load", daemon=True).start()

    @property
    def _failure(self) -> str:
        """Why the model is not loaded; empty where it is."""
        return self._attempts.failure

    def _load(self) -> bool:
        """Load the model, and be ready to serve it; False if it cannot be loaded."""
        with collection_paused():
            from stepserve.composition import load_runner

        began_s = time.monotonic()
        self._attempts.begin()
        try:
            runner = load_runner(self.spec.model_id, self.spec.settings)
        except Exception as error:
            self._note_failure(error)
            return False
        self._serve(runner, time.monotonic() - began_s)
        return True

    def _note_failure(self, error: Exception) -> None:
        from stepserve.pipelines.loading.reasons import NO_FOLDER, reason_of

        missing = isinstance(error, ModelNotFoundError)
        self._attempts.failed(NO_FOLDER if missing else reason_of(error))
        ours = isinstance(error, StepserveError)
        logger.error(
            "model %s cannot be loaded: %s; %s",
            self.spec.model_id,
            error if ours else f"{type(error).__name__}: {error}",
            self._attempts.prospect,
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

    def _serve(self, runner: PipelineRunner, load_s: float) -> None:
        model_id = self.spec.model_id
        self.runner, self.load_s = runner, load_s
        logger.info("model %s is ready after %.1f s", model_id, load_s)
        traces = open_request_traces()
        self.metrics = ReplicaMetrics(runner, model_id, load_s, traces)
        self.metrics.start()
        self.desk = RequestTracker(runner, traces or NOT_WATCHED)
        if (trim := heap_trimmer()) is not None:
            Flusher(trim, TRIM_INTERVAL_S, "heap").start()
        stuck_after_s = self.spec.settings.engine.stuck_after_s
        watch_interpreter(stuck_after_s)
        watch_work(self._silent_s, stuck_after_s)
        # Last of all: other threads ask for it before they use any of the above.
        self._attempts.succeeded()

    async def status(self, caller: str = "") -> ModelStatus:
        """What the model can do, and whether it takes requests. Answered once it is warm.

        An ingress asks every second: so it is known to be there, and to wait for what it asked for.
        """
        if caller:
            self.callers.hear(caller)
        aliases = self.spec.settings.aliases
        if self._failure:
            return unknown_status(self.spec.model_id, self._failure, aliases)
        load_s = round(self.load_s, 1)
        capabilities = replace(self.runner.capabilities(), load_s=load_s, aliases=aliases)
        if self._draining:
            return ModelStatus(capabilities, ready=False, detail="draining")
        return ModelStatus(capabilities, ready=True)

    async def generate(self, request: GenerationRequest, caller: str = "") -> Outcome:
        """Serve a request to its end. Errors are returned, not raised: they cross processes."""
        outcome: Outcome | None = None
        async with aclosing(self.stream(request, caller)) as events:
            async for event in events:
                if isinstance(event, Finished | Failed):
                    outcome = event
        assert outcome is not None
        return outcome

    async def stream(
        self, request: GenerationRequest, caller: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Serve a request, and tell what happens to it, up to its end.

        Closing the stream, or cancelling whoever reads it, cancels the request; so does a `caller`
        of that id that is not heard from any more.
        """
        if self._failure:
            message = f"model {self.spec.model_id} {self._failure}"
            yield Failed(request.id, NotReadyError(message, self._attempts.retry_after_s))
            return
        try:
            events = await self.desk.submit(request)
        except RequestIdInUseError as error:
            yield Failed(request.id, error)
            return
        key = request.key
        self.callers.begin(key, caller)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Failed) and key in self._orphaned:
                    event = Failed(request.id, StoppedError("its ingress was not heard from"))
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self.callers.end(key)
            self._orphaned.discard(key)
            self.desk.give_up(key)

    async def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands, or None if this replica knows none such of that owner."""
        return None if self._failure else self.desk.progress(key)

    async def cancel(self, key: RequestKey) -> Progress | None:
        """End a request at its next step; None if this replica knows none such of that owner."""
        return None if self._failure else self.desk.cancel(key)

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        """The events of a request from `number` on, as soon as there are any, or after `wait_s`.

        None if this replica knows none such of that owner.
        """
        if self._failure:
            return None
        return await self.desk.events(key, number, wait_s)

    async def batch(self) -> BatchView | None:
        """What the engine has in hand, and its latest forwards; None where there is no engine."""
        return None if self._failure else self.runner.view()

    async def drain(self) -> None:
        """Refuse new work and return when what is in hand has ended."""
        self._draining = True
        if self._failure:
            return
        drain_s = self.spec.settings.engine.drain_s
        in_hand = self.runner.engine.load().requests
        logger.info("draining: %d requests in hand get up to %.0f s", in_hand, drain_s)
        await asyncio.to_thread(self.runner.stop, drain_s)
        # Sending the last spans may take seconds, and those that were cut off wait for an answer.
        await asyncio.to_thread(self.metrics.stop)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve, which tells the routers."""
        return {} if self._failure else self.desk.report().to_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, which hands it to the policy."""
        return {BACKLOG: 0.0 if self._failure else self.runner.engine.load().backlog_s}

    async def check_health(self) -> None:
        """Called by Ray Serve every now and then."""
        if self._failure:
            return
        for key in self.callers.orphans():
            logger.warning("request %s is given up: its ingress is gone", key.id)
            self.callers.end(key)
            self._orphaned.add(key)
            self.desk.give_up(key)

    def _silent_s(self) -> float:
        """Seconds since the engine last showed life. One that drained has no engine any more."""
        return 0.0 if self._draining else self.runner.engine.silent_s()


def _own_folder(spec: ReplicaSpec) -> Path | None:
    """Where the model lies, if that is not the embedded model's folder or a hub."""
    settings = spec.settings
    return None if settings.path is None or settings.revision else Path(settings.path)
