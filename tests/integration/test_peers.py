"""The servers that Stepserve is raced against make the same images of the same requests."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from loadtests.load.client import Target, body_of, open_session
from loadtests.load.contenders import contenders, running
from loadtests.load.http_shape import GENERATIONS
from loadtests.load.scenarios import wait_until_serving
from loadtests.load.trace import TraceRequest
from loadtests.peers.common import ImageRequest, PeerSettings, load_pipeline, make_batch

REQUEST = TraceRequest("red heart", "48x64", 4, 4.0, "EulerDiscreteScheduler", seed=3, n=2)
CLOSE = 0.2
"""Levels of 255, as a mean over all pixels."""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """As many as before: peers choose for their whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pixels(response: dict[str, Any]) -> list[Image.Image]:
    files = [io.BytesIO(base64.b64decode(image["b64_json"])) for image in response["data"]]
    return [Image.open(file).convert("RGB") for file in files]


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


def ask(url: str) -> list[Image.Image]:
    response = httpx.post(
        f"{url}{GENERATIONS}", json=body_of(REQUEST), timeout=120, trust_env=False
    )
    assert response.status_code == 200, response.text
    return pixels(response.json())


async def wait(url: str) -> None:
    async with open_session(Target(url)) as session:
        await wait_until_serving(session, REQUEST)


@pytest.mark.slow
def test_a_peer_makes_the_images_that_stepserve_makes(service: Any, tmp_path: Path) -> None:
    peer = contenders(2)["fastapi-lock"]
    with running(peer, tmp_path / "peer.log") as url:
        asyncio.run(wait(url))
        theirs = ask(url)
    for one, other in zip(ask(service.url), theirs, strict=True):
        assert difference(one, other) < CLOSE


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(replace(PeerSettings.read(), threads=1))


def requests() -> list[ImageRequest]:
    first = ImageRequest(prompt="red heart", num_inference_steps=3, seed=1)
    return [
        first,
        first.model_copy(update={"size": "48x64", "n": 2}),
        first.model_copy(update={"seed": 5, "prompt": "pizza"}),
        first.model_copy(update={"num_inference_steps": 6}),
    ]


@pytest.mark.parametrize(("pad_steps", "calls"), [(False, 3), (True, 2)])
def test_a_batch_gives_each_request_its_own_images(
    pipeline: Any, pad_steps: bool, calls: int
) -> None:
    asked = requests()
    keys = {request.padded_key if pad_steps else request.exact_key for request in asked}
    assert len(keys) == calls
    responses = make_batch(pipeline, asked, pad_steps)
    assert [len(response["data"]) for response in responses] == [1, 2, 1, 1]
    assert [response["seed"] for response in responses] == [1, 1, 5, 1]
    assert [image.size for image in pixels(responses[1])] == [(48, 64)] * 2
    longest = max(request.num_inference_steps for request in asked)
    for index in (0, 2):
        steps = longest if pad_steps else asked[index].num_inference_steps
        alone = asked[index].model_copy(update={"num_inference_steps": steps})
        (response,) = make_batch(pipeline, [alone], pad_steps=False)
        (one,), (other,) = pixels(responses[index]), pixels(response)
        assert difference(one, other) < CLOSE
