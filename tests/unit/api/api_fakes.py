"""A backend in memory, and the app around it."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import httpx
from fastapi import FastAPI
from PIL import Image
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import ApiKey, KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.results.store import ResultStore
from stepserve.config import HttpSettings, Settings
from stepserve.domain.errors import CancelledError
from stepserve.domain.events import (
    Accepted,
    EncodedImage,
    Event,
    Failed,
    Finished,
    Outcome,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import Fingerprint, ModelCapabilities, SizeRange
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.request_log import NumberedEvent, RequestLog
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.tasks import Task
from stepserve.domain.timings import Timings
from usual_tasks import USUAL_TASKS

FINGERPRINT = Fingerprint(
    weights="aa11",
    stepserve="0.1.0",
    torch="2.13.0",
    diffusers="0.42.1",
    transformers="5.23.0",
    device="cpu",
    processor="AVX512",
    dtype="bfloat16",
)


def image_file(color: str) -> bytes:
    """A small PNG file of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


EMOJI = ModelCapabilities(
    id="emoji",
    description="small",
    sizes=SizeRange(minimum=48, maximum=128, step=16, native=64),
    schedulers=("ddim", "euler"),
    default_scheduler="euler",
    max_num_inference_steps=100,
    max_prompt_characters=50,
    adapters=("pixels", "ink"),
    max_adapters=2,
    tasks={task: USUAL_TASKS[task] for task in (Task.TEXT_TO_IMAGE, Task.INPAINTING)},
    fingerprint=FINGERPRINT,
)
_stores = itertools.count()
TIMINGS = Timings(queue_s=0.001, denoise_s=0.25, total_s=0.3, batch_share=0.5)
SETTINGS = Settings(
    http=HttpSettings(max_body_bytes=2000, max_upload_bytes=2000, request_timeout_s=30)
)

Generate = Callable[[GenerationRequest], Awaitable[Outcome]]
Stream = Callable[[GenerationRequest], AsyncIterator[Event]]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeBackend:
    """Serves at once; set `stream_with` for anything else, or `generate_with` for another end.

    Keeps the requests it got.
    """

    def __init__(self) -> None:
        self.statuses = [ModelStatus(EMOJI, ready=True)]
        self.requests: list[GenerationRequest] = []
        self.stream_with: Stream = run_through
        self.log = RequestLog(time.monotonic, time.time)
        self.batches: list[BatchView] = []
        # Whether questions for news find nobody, one after another.
        self.unheard: Iterator[bool] = iter(())
        self.asked_for_events = 0

    def generate_with(self, generate: Generate) -> None:
        """From now on, requests have no event but their end."""

        async def stream(request: GenerationRequest) -> AsyncIterator[Event]:
            yield await generate(request)

        self.stream_with = stream

    async def start(self) -> None:
        pass

    async def models(self) -> Sequence[ModelStatus]:
        return self.statuses

    async def model(self, model_id: str) -> ModelStatus | None:
        by_id = {status.capabilities.id: status for status in self.statuses}
        return by_id.get(model_id)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.log.open(request)
        try:
            async with aclosing(cast(Any, self.stream_with(request))) as events:
                async for event in events:
                    self.log.add(request.key, event)
                    yield event
        finally:
            self.log.add(request.key, Failed(request.id, CancelledError("gone")))

    async def progress(self, key: RequestKey) -> Progress | None:
        return self.log.progress(key)

    async def prompts(self, call: RequestKey) -> Sequence[Progress]:
        return [p for key in self.log.prompts_of(call) if (p := self.log.progress(key)) is not None]

    async def cancel(self, key: RequestKey) -> Progress | None:
        error = CancelledError(f"request {key.id} was cancelled")
        self.log.add(key, Failed(key.id, error))
        return await self.progress(key)

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        self.asked_for_events += 1
        if next(self.unheard, False):
            return None
        events = self.log.events_since(key, number)
        if not events and self.log.is_in_flight(key):
            # Somebody asks again at once.
            await asyncio.sleep(0)
            events = self.log.events_since(key, number)
        return events

    async def batch(self, model_id: str, owner: str) -> Sequence[BatchView]:
        return self.batches


class Blocking:
    """Works for ever, and tells (also other threads) when it began and when it was cancelled."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, request: GenerationRequest) -> Outcome:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError("unreachable")


async def finish(request: GenerationRequest) -> Outcome:
    """Make "images" that say their seed."""
    seeds = range(request.seed, request.seed + request.n)
    images = tuple(EncodedImage(b"seed %d" % seed, "image/png", seed) for seed in seeds)
    return Finished(request.id, images, TIMINGS, FINGERPRINT.short)


async def run_through(request: GenerationRequest) -> AsyncIterator[Event]:
    """Two steps, with as many previews as wanted between them."""
    yield Accepted(request.id, 0, 0.5)
    yield Started(request.id)
    yield StepFinished(request.id, 1, 2)
    for index in range(request.previews):
        previews = tuple(
            EncodedImage(b"preview %d" % index, "image/png", request.seed + i)
            for i in range(request.n)
        )
        yield Preview(request.id, index, 1, 2, previews)
    yield StepFinished(request.id, 2, 2)
    yield await finish(request)


def raising(error: Exception) -> Generate:
    async def generate(request: GenerationRequest) -> Outcome:
        raise error

    return generate


def make_store() -> ResultStore:
    return ResultStore(f"memory://results-{next(_stores)}", 60, b"secret")


def make_app(
    backend: FakeBackend,
    settings: Settings = SETTINGS,
    keys: Sequence[ApiKey] = (),
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> FastAPI:
    access = Access(KeyRing(keys), LocalUsage(clock))
    return create_app(backend, settings, make_store(), access, **options)


def client_for(
    backend: FakeBackend, settings: Settings = SETTINGS, **options: Any
) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=make_app(backend, settings, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://test")
