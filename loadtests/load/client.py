"""Sending the requests of a trace over HTTP, and what became of each.

The client sends when the schedule says so, whatever the server does (an open loop), and counts from
the moment a request should have been sent. A client that waited for answers, or counted from when
it got round to sending, would not see the queue that it caused: coordinated omission.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

import aiohttp
from PIL import Image

from loadtests.load.http_shape import EDITS, EXPIRED, GENERATIONS, REFUSED, read_server_timing
from loadtests.load.trace import TraceRequest

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_CHARACTERS = 32
DEFAULT_GIVE_UP_S = 120.0
LOOK_EVERY_S = 0.25


class Status(StrEnum):
    """What became of a request."""

    OK = "ok"
    REFUSED = "refused"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GIVEN_UP = "given_up"


@dataclass(frozen=True)
class Outcome:
    """One request's way. Seconds are counted from the start of the run.

    `intended_s` is when the schedule says it should be sent. What only some servers tell is None
    where it was not told.
    """

    index: int
    status: Status
    intended_s: float
    sent_s: float
    ended_s: float
    http_status: int = 0
    queue_s: float | None = None
    first_step_s: float | None = None
    batch_share: float | None = None
    detail: str = ""

    @property
    def latency_s(self) -> float:
        """From when it should have been sent."""
        return self.ended_s - self.intended_s

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return self.sent_s - self.intended_s


@dataclass(frozen=True)
class Target:
    """The server that is measured, and how to speak to it.

    With `headers` an API key can be sent.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Patience:
    """How long clients wait, in seconds, by request of the trace.

    Args:
        leave_s: when an impatient client leaves; None: it does not.
        deadline_s: sent along, so that the server may drop what comes too late; None: not sent.
        give_up_s: when the harness ends a request, for good measure.
    """

    leave_s: tuple[float | None, ...]
    deadline_s: tuple[float | None, ...]
    give_up_s: float = DEFAULT_GIVE_UP_S


def endless_patience(count: int, give_up_s: float = DEFAULT_GIVE_UP_S) -> Patience:
    """Nobody leaves, and no deadlines are sent."""
    return Patience((None,) * count, (None,) * count, give_up_s)


def body_of(request: TraceRequest, deadline_s: float | None = None) -> dict[str, Any]:
    """The JSON body, in the small shape that all measured servers understand."""
    body: dict[str, Any] = {
        "prompt": request.prompt,
        "size": request.size,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "seed": request.seed,
        "n": request.n,
    }
    if request.strength is not None:
        body |= {"strength": request.strength, "image": _image(request.size)}
    if deadline_s is not None:
        body["deadline_s"] = deadline_s
    return body


def open_session(target: Target) -> aiohttp.ClientSession:
    """A session without limits of its own: the client must never be the queue."""
    return aiohttp.ClientSession(
        base_url=target.url,
        headers=dict(target.headers),
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


async def send_open_loop(
    session: aiohttp.ClientSession,
    trace: Sequence[TraceRequest],
    arrivals: Sequence[float],
    patience: Patience,
    is_hopeless: Callable[[Sequence[Outcome], float], bool] = lambda outcomes, now_s: False,
) -> list[Outcome]:
    """Send each request when it is due, and return what became of all that were sent.

    Args:
        is_hopeless: asked now and then with what has ended and the seconds so far; the run is
            broken off when it says yes.
    """
    started_s = time.perf_counter()
    ended: list[Outcome] = []

    async def one(index: int) -> None:
        await asyncio.sleep(max(started_s + arrivals[index] - time.perf_counter(), 0))
        call = Call(session, index, trace[index], patience)
        ended.append(await call.run(started_s, arrivals[index]))

    tasks = [asyncio.create_task(one(index)) for index in range(len(arrivals))]
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, timeout=LOOK_EVERY_S)
        if pending and is_hopeless(ended, time.perf_counter() - started_s):
            break
    for task in pending:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            raise error
    return sorted(ended, key=lambda outcome: outcome.index)


async def send_windowed(
    session: aiohttp.ClientSession, trace: Sequence[TraceRequest], in_flight: int
) -> list[Outcome]:
    """Send everything at once, at most `in_flight` at a time; what is refused is sent again.

    For throughput only: latencies of a closed loop say nothing about users.
    """
    started_s = time.perf_counter()
    room = asyncio.Semaphore(in_flight)
    patience = endless_patience(len(trace), give_up_s=float("inf"))

    async def one(index: int) -> Outcome:
        async with room:
            while True:
                now_s = time.perf_counter() - started_s
                call = Call(session, index, trace[index], patience)
                outcome = await call.run(started_s, now_s)
                if outcome.status is not Status.REFUSED:
                    return outcome
                await asyncio.sleep(LOOK_EVERY_S)

    return list(await asyncio.gather(*(one(index) for index in range(len(trace)))))


@dataclass(frozen=True, eq=False)
class Call:
    """One request on its way."""

    session: aiohttp.ClientSession
    index: int
    request: TraceRequest
    patience: Patience

    async def run(self, started_s: float, intended_s: float) -> Outcome:
        """Send it now, wait for its answer, and never raise for what a server does."""
        sent_s = time.perf_counter() - started_s
        leave_s = self.patience.leave_s[self.index]
        limit_s = min(leave_s or float("inf"), self.patience.give_up_s)
        told = _Told(Status.GIVEN_UP if leave_s is None else Status.CANCELLED)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s if limit_s < float("inf") else None):
                told = await self._response()
        return Outcome(
            index=self.index,
            status=told.status,
            intended_s=intended_s,
            sent_s=sent_s,
            ended_s=time.perf_counter() - started_s,
            http_status=told.http_status,
            queue_s=told.timings.get("queue"),
            first_step_s=told.timings.get("first-step"),
            batch_share=told.timings.get("batch"),
            detail=told.detail,
        )

    async def _response(self) -> _Told:
        url = GENERATIONS if self.request.strength is None else EDITS
        body = body_of(self.request, self.patience.deadline_s[self.index])
        try:
            async with self.session.post(url, json=body) as response:
                data = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            return _Told(Status.FAILED, detail=f"{type(error).__name__}: {error}")
        if response.status in REFUSED:
            return _Told(Status.REFUSED, response.status)
        if response.status == EXPIRED:
            return _Told(Status.EXPIRED, response.status)
        if response.status != 200:
            return _Told(Status.FAILED, response.status, detail=data[:200].decode(errors="replace"))
        complaint = complaint_about(data, self.request)
        timings = read_server_timing(response.headers.get("Server-Timing", ""))
        status = Status.FAILED if complaint else Status.OK
        return _Told(status, response.status, complaint, timings)


@dataclass(frozen=True)
class _Told:
    """What an answer told."""

    status: Status
    http_status: int = 0
    detail: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)


def complaint_about(data: bytes, request: TraceRequest) -> str:
    """What is wrong with an answer; empty: nothing.

    Only the head of a file is read: decoding images would take time from the server beside it.
    """
    try:
        images = json.loads(data)["data"]
        heads = [base64.b64decode(p["b64_json"][:PNG_HEADER_CHARACTERS]) for p in images]
    except (ValueError, LookupError, TypeError) as error:
        return f"the answer is not as expected: {error!r}"
    if len(heads) != request.n:
        return f"{len(heads)} images instead of {request.n}"
    if not all(head.startswith(PNG_START) for head in heads):
        return "an image is no PNG"
    sizes = {"{}x{}".format(*struct.unpack(">II", head[16:24])) for head in heads}
    return "" if sizes == {request.size} else f"sizes {sizes} instead of {request.size}"


@cache
def _image(size: str) -> str:
    """An image to change, as a data URL: a red square on white."""
    width, height = map(int, size.split("x"))
    image = Image.new("RGB", (width, height), "white")
    image.paste((200, 40, 40), (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
