"""A real model behind the API, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api_fakes import FakeBackend
from stepserve.domain.model_status import ModelStatus
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.ray_serve.replica.request_tracker import RequestTracker


@contextmanager
def running(folder: Path, model_id: str = "tiny") -> Iterator[tuple[PipelineRunner, FakeBackend]]:
    """A backend whose requests go the way of a replica's, from the folder of the model on."""
    model = load_model(model_id, folder, dtype="float32", device="cpu")
    options = EngineOptions(max_rows=16, max_pending_images=64)
    # Requests share as they come: that was found out elsewhere, and takes seconds.
    runner = PipelineRunner(model, options, sharing=SharingOptions(plan=SharingPlan()))
    runner.start()
    backend = FakeBackend()
    backend.statuses = [ModelStatus(runner.capabilities(), ready=True)]
    backend.stream_with = RequestTracker(runner).submit
    try:
        yield runner, backend
    finally:
        runner.stop()
