"""A real server whose images come from a backend in memory, step by step."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import uvicorn
from api_fakes import EMOJI, TIMINGS, FakeBackend, make_app
from PIL import Image
from stepserve.api.auth.keys import ApiKey
from stepserve.config import Settings
from stepserve.domain.errors import CancelledError
from stepserve.domain.events import (
    Accepted,
    EncodedImage,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.reports import BatchView, RequestInBatch, RowsInForward, SharedForward
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.states import RequestState
from usual_tasks import USUAL_TASKS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def drawn_image(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


class SteppingBackend(FakeBackend):
    """Makes its images step by step, at the pace of a small model, and shows its batch."""

    def __init__(self) -> None:
        super().__init__()
        tasks = USUAL_TASKS
        told = vars(EMOJI) | {"tasks": tasks, "max_num_inference_steps": 1000}
        self.statuses = [ModelStatus(EMOJI.__class__(**told), ready=True)]
        self.stream_with = self.step_through
        self.step_s = 0.01
        self.forwards = 0
        # With a step cache: every so many steps one is skipped.
        self.skips_every = 0
        self.skipped: list[str] = []

    async def step_through(self, request: GenerationRequest) -> AsyncIterator[Event]:
        yield Accepted(request.id, 0, 1.0)
        yield Started(request.id)
        steps = request.num_inference_steps
        for step in range(1, steps + 1):
            await asyncio.sleep(self.step_s)
            if not self.log.is_in_flight(request.key):
                yield Failed(request.id, CancelledError(f"request {request.id} was cancelled"))
                return
            self._show(request, step)
            yield StepFinished(request.id, step, steps)
            if request.previews and step % max(steps // (request.previews + 1), 1) == 0:
                file = EncodedImage(drawn_image(step % 256), "image/png", request.seed)
                yield Preview(request.id, 0, step, steps, (file,))
        files = tuple(
            EncodedImage(drawn_image(200 + i), "image/png", request.seed + i)
            for i in range(request.n)
        )
        yield Finished(request.id, files, TIMINGS)
        self.batches = [BatchView(32, (), self.batches[0].forwards)]

    def _show(self, request: GenerationRequest, step: int) -> None:
        rows = CLASSIC.rows_of(request)
        skipped = step // self.skips_every if self.skips_every else 0
        shown = RequestInBatch(
            request.id, RequestState.RUNNING, step, request.num_inference_steps, rows, skipped
        )
        before = self.batches[0].forwards if self.batches else ()
        if self.skips_every and step % self.skips_every == 0:
            self.skipped.append(request.id)
        else:
            before = (*before, self._forward(request, rows))[-64:]
        self.batches = [BatchView(32, (shown,), before)]

    def _forward(self, request: GenerationRequest, rows: int) -> SharedForward:
        """Shared with somebody else's request, which skipped as many steps."""
        self.forwards += 1
        shared = (RowsInForward(request.id, rows), RowsInForward(None, 1))
        skipped = (*self.skipped, *[None] * len(self.skipped))
        self.skipped.clear()
        return SharedForward(self.forwards, "unet.forward", rows + 1, 0, 0.02, shared, skipped)


@dataclass
class Site:
    """A running server."""

    url: str
    backend: SteppingBackend = field(default_factory=SteppingBackend)


def serve(backend: SteppingBackend, keys: tuple[ApiKey, ...] = ()) -> Iterator[Site]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(backend, Settings(), keys)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", backend)
    server.should_exit = True
    server.force_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@dataclass
class Watched:
    """What a page did that it should not have done."""

    problems: list[str] = field(default_factory=list)
