"""The HTTP API over an engine with a real, tiny model, in one process: no socket and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial

import httpx
from api_fakes import FakeBackend, client_for
from stepserve.config import HttpSettings, Settings
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.serving.runner import PipelineRunner

SETTINGS = Settings(http=HttpSettings(max_body_bytes=32 * 2**20, request_timeout_s=120))


@contextmanager
def running(model: LoadedModel) -> Iterator[PipelineRunner]:
    """An engine on one thread, ended with the block."""
    runner = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=100, threads=1))
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()


def client_of(runner: PipelineRunner) -> httpx.AsyncClient:
    """A client of the API that has this model only."""
    backend = FakeBackend()
    backend.statuses = [ModelStatus(runner.capabilities(), ready=True)]
    backend.stream_with = partial(_events, runner)
    settings = SETTINGS.model_copy(update={"default_model": runner.capabilities().id})
    return client_for(backend, settings)


async def _events(runner: PipelineRunner, request: GenerationRequest) -> AsyncIterator[Event]:
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def told(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    runner.submit(request, told)
    while not isinstance(event := await events.get(), Finished | Failed):
        yield event
    yield event
