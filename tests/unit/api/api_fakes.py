"""A backend in memory, and the app around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import httpx

from service.api import ApiSettings, ModelStatus, create_app
from service.domain.events import EncodedImage, Finished, Outcome
from service.domain.fingerprint import Fingerprint
from service.domain.models import ModelCapabilities, SizeRange
from service.domain.requests import GenerationRequest, Task
from service.domain.timings import Timings

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
    tasks=(Task.TEXT_TO_IMAGE, Task.INPAINTING),
    fingerprint=FINGERPRINT,
)
TIMINGS = Timings(queue_s=0.001, denoise_s=0.25, total_s=0.3, batch_share=0.5)
SETTINGS = ApiSettings(default_model="emoji", max_body_bytes=2000, request_timeout_s=30)

Generate = Callable[[GenerationRequest], Awaitable[Outcome]]


class FakeBackend:
    """Answers at once; set `generate_with` for anything else. Keeps the requests it got."""

    def __init__(self) -> None:
        self.statuses = [ModelStatus(EMOJI, ready=True)]
        self.requests: list[GenerationRequest] = []
        self.generate_with: Generate = finish

    async def models(self) -> Sequence[ModelStatus]:
        return self.statuses

    async def generate(self, request: GenerationRequest) -> Outcome:
        self.requests.append(request)
        return await self.generate_with(request)


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
    """Make "pictures" that say their seed."""
    seeds = range(request.seed, request.seed + request.n)
    images = tuple(EncodedImage(b"seed %d" % seed, "image/png", seed) for seed in seeds)
    return Finished(request.id, images, TIMINGS, FINGERPRINT.short)


def raising(error: Exception) -> Generate:
    async def generate(request: GenerationRequest) -> Outcome:
        raise error

    return generate


def client_for(backend: FakeBackend, settings: ApiSettings = SETTINGS) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(backend, settings))
    return httpx.AsyncClient(transport=transport, base_url="http://test")
