"""What the process that answers HTTP holds in memory while images pour in, and afterwards."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from PIL import Image
from running_service import Service

EDITS = "/v1/images/edits"
MOST_BYTES = 700 * 2**20
LEFT_BYTES = 400 * 2**20
GIVEN_BACK_WITHIN_S = 60
LOOK_EVERY_S = 0.2

Ask = Callable[[httpx.AsyncClient], Coroutine[Any, Any, httpx.Response]]


@dataclass
class Seen:
    """Answers by status, and the most that the ingress held meanwhile."""

    statuses: Counter[int]
    peak_bytes: int
    slowest_health_s: float


def ingress_of(service: Service) -> psutil.Process:
    assert service.process is not None
    children = psutil.Process(service.process.pid).children(recursive=True)
    [ingress] = [p for p in children if "ServeReplica:stepserve:ingress" in " ".join(p.cmdline())]
    return ingress


async def watch(service: Service, count: int, ask: Ask) -> Seen:
    ingress = ingress_of(service)
    peak_bytes, slowest_s = 0, 0.0
    limits = httpx.Limits(max_connections=None)
    options: dict[str, Any] = {"base_url": service.url, "trust_env": False, "limits": limits}
    async with httpx.AsyncClient(timeout=170, **options) as client:
        asking = [asyncio.create_task(ask(client)) for _ in range(count)]
        while not all(task.done() for task in asking):
            peak_bytes = max(peak_bytes, ingress.memory_info().rss)
            began_s = time.monotonic()
            assert (await client.get("/healthz")).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            await asyncio.sleep(LOOK_EVERY_S)
        responses = [task.result() for task in asking]
    for response in responses:
        assert response.status_code != 429 or int(response.headers["Retry-After"]) >= 1
    return Seen(Counter(response.status_code for response in responses), peak_bytes, slowest_s)


def assert_given_back(service: Service) -> None:
    ingress, deadline_s = ingress_of(service), time.monotonic() + GIVEN_BACK_WITHIN_S
    while ingress.memory_info().rss > LEFT_BYTES:
        assert time.monotonic() < deadline_s, f"{ingress.memory_info().rss >> 20} MB are kept"
        time.sleep(1)


def edit_of(file: bytes, steps: int = 2) -> Ask:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        fields = {"prompt": "heart", "num_inference_steps": str(steps)}
        return await client.post(EDITS, data=fields, files={"image": file})

    return ask


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_small_files_of_many_pixels_are_all_served(service: Service) -> None:
    file = png(Image.new("RGBA", (4096, 4096), (0, 0, 0, 128)))
    seen = asyncio.run(watch(service, 16, edit_of(file)))

    assert set(seen.statuses) <= {200, 429}
    assert seen.statuses[200] >= 12
    assert seen.peak_bytes < MOST_BYTES
    assert seen.slowest_health_s < 5
    assert_given_back(service)


def test_large_bodies_are_read_or_refused(service: Service) -> None:
    text = "data:image/png;base64," + "A" * 20_000_000

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(EDITS, json={"prompt": "x", "image": text})

    seen = asyncio.run(watch(service, 30, ask))

    assert set(seen.statuses) <= {400, 429, 503}
    assert seen.peak_bytes < MOST_BYTES
    assert_given_back(service)


def test_large_files_are_served_or_refused(service: Service) -> None:
    size = (1700, 1700)
    noise = Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3))
    seen = asyncio.run(watch(service, 30, edit_of(png(noise))))

    assert set(seen.statuses) <= {200, 429, 503}
    assert seen.statuses[200] >= 5
    assert seen.peak_bytes < MOST_BYTES
    assert_given_back(service)
