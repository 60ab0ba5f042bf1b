"""The whole service over HTTP: real Ray Serve, the real embedded model, real clients."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import diffusers
import httpx
import openai
import psutil
import pytest
import torch
from chaos import INGRESS, REPLICA, processes_of
from PIL import Image
from running_service import Service
from stepserve.config import EngineSettings
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model

GENERATIONS = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    """One parsed answer."""

    body: dict
    headers: httpx.Headers

    def image(self, index: int = 0) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self.body["data"][index]["b64_json"])))


def generate(client: httpx.Client, **body: object) -> Answer:
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == 200, response.text
    return Answer(response.json(), response.headers)


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    """The channels of one pixel."""
    return cast("tuple[int, ...]", image.getpixel((x, y)))


def test_is_ready_and_says_what_it_serves(client: httpx.Client) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    assert client.get("/docs").status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "emoji"
    assert model["sizes"] == {"minimum": 48, "maximum": 128, "step": 16, "native": 64}
    assert "DDIMScheduler" in model["schedulers"]


def test_first_image_was_made_on_start(service) -> None:
    with Image.open(service.folder / "out" / "first-image.png") as image:
        assert image.size == (64, 64)
    assert service.url in service.log


def test_a_red_heart_is_red(client: httpx.Client) -> None:
    image = generate(client, prompt="red heart", seed=3).image().convert("RGB")
    red, green, blue = pixel(image, 32, 30)
    assert red > 150
    assert red > green + 80
    assert red > blue + 80
    assert min(pixel(image, 1, 62)) > 200, "the background should be white"


def test_background_colour_is_obeyed(client: httpx.Client) -> None:
    response = generate(client, prompt="rocket on a blue background", seed=5)
    red, _, blue = pixel(response.image().convert("RGB"), 2, 2)
    assert blue > red + 60


def test_png_holds_every_parameter(client: httpx.Client) -> None:
    response = generate(
        client,
        prompt="pizza",
        negative_prompt="cheese",
        n=2,
        size="80x48",
        num_inference_steps=7,
        guidance_scale=3.5,
        seed=11,
        scheduler="EulerDiscreteScheduler",
    )
    second = response.image(1)
    assert second.size == (80, 48)
    parameters = json.loads(second.info["parameters"])
    expected = {
        "prompt": "pizza",
        "negative_prompt": "cheese",
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "seed": 12,
        "scheduler": "EulerDiscreteScheduler",
        "model": "emoji",
        "width": 80,
        "height": 48,
    }
    assert expected.items() <= parameters.items()
    assert [image["seed"] for image in response.body["data"]] == [11, 12]


def test_answers_say_what_shaped_the_image_and_where_it_was_made(client: httpx.Client) -> None:
    wanted = {"guidance_start": 0.1, "guidance_end": 0.6, "reproducible": True}
    given = {"priority": "interactive", "deadline_s": 60, "num_inference_steps": 10, "seed": 1}
    one, other = (generate(client, prompt="pizza", **wanted, **given) for _ in range(2))
    assert wanted.items() <= one.body["parameters"].items()
    assert one.body["data"] == other.body["data"]
    (model,) = client.get("/v1/models").json()["data"]
    assert model["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    assert one.body["fingerprint"] == model["fingerprint"]["short"]
    assert model["fingerprint"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("output_format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats(client: httpx.Client, output_format: str, kind: str) -> None:
    response = generate(client, prompt="pizza", num_inference_steps=2, output_format=output_format)
    assert response.image().format == kind


@pytest.fixture
def all_cores() -> Iterator[None]:
    """As the replica's torch uses them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_same_image_as_diffusers_alone_while_others_share_the_batch(
    client: httpx.Client, all_cores: None
) -> None:
    schedulers = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
    bodies = [
        {
            "prompt": "cat face",
            "seed": index,
            "num_inference_steps": 5 + 3 * index,
            "guidance_scale": 1.0 if index % 3 == 2 else 4.0,
            "scheduler": schedulers[index % 3],
        }
        for index in range(9)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: generate(client, **body), bodies))
    told = [re.search(r"share ([0-9.]+)", a.headers["server-timing"]) for a in responses]
    shares = [float(share[1]) for share in told if share]
    assert len(shares) == len(bodies)
    assert min(shares) < 0.6, "no forward was shared"
    pipeline = load_model("emoji", EMBEDDED).pipeline
    for body, response in zip(bodies, responses, strict=True):
        scheduler = getattr(diffusers, str(body["scheduler"]))
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        plain = pipeline(
            body["prompt"],
            num_inference_steps=body["num_inference_steps"],
            guidance_scale=body["guidance_scale"],
            generator=[torch.Generator().manual_seed(cast(int, body["seed"]))],
        ).images[0]
        assert plain.tobytes() == response.image().convert("RGB").tobytes(), body


def test_openai_client_works_unchanged(service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0)
    response = client.images.generate(
        model="emoji",
        prompt="sunflower",
        n=2,
        size="64x64",
        response_format="b64_json",
        user="someone",
        extra_body={"seed": 4, "num_inference_steps": 4},
    )
    assert response.data is not None
    assert len(response.data) == 2
    with Image.open(io.BytesIO(base64.b64decode(str(response.data[0].b64_json)))) as image:
        assert image.size == (64, 64)
    assert "emoji" in [model.id for model in client.models.list()]
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt="sunflower", size="1024x1024")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "x", "sead": 1}, 400, ("sead", "seed")),
        ({"prompt": "x", "n": "2"}, 400, ("n",)),
        ({"prompt": "x", "size": "50x50"}, 400, ("size", "50", "48 to 128")),
        (
            {"prompt": "x", "num_inference_steps": 1001},
            400,
            ("num_inference_steps", "1001", "1000"),
        ),
        ({"prompt": "x", "n": 99}, 400, ("n", "99", "8")),
        ({"prompt": "  "}, 400, ("prompt", "empty")),
        ({"prompt": "heart " * 60}, 400, ("prompt", "tokens", "32")),
        ({"prompt": "x" * 1001}, 400, ("prompt", "1001", "1000")),
        ({"prompt": "x", "model": "nope"}, 404, ("nope", "emoji")),
        ({"prompt": "x", "user": "u" * 21_000_000}, 413, ("20971520",)),
    ],
)
def test_bad_requests_name_field_value_and_limit(
    client: httpx.Client, body: dict, status: int, words: tuple[str, ...]
) -> None:
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


async def leave_once_it_is_full(service: Service) -> httpx.Response:
    """Three ask for 24 images together and leave; returns what one more was told before that."""
    long = {"prompt": "house", "n": 8, "num_inference_steps": 1000}
    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as client:
        names = [f"leaving-{number}" for number in range(3)]
        leaving = [
            asyncio.create_task(client.post(GENERATIONS, json=long, headers={"X-Request-ID": name}))
            for name in names
        ]
        for name in names:
            while (await client.get(f"/v1/requests/{name}")).status_code == 404:
                await asyncio.sleep(0.05)
        refused = await client.post(GENERATIONS, json={"prompt": "house"})
        for task in leaving:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
    return refused


def test_full_server_refuses_and_a_client_that_leaves_frees_its_place(service, client) -> None:
    refused = asyncio.run(leave_once_it_is_full(service))
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error" or refused.json()["error"]["code"]
    # 24 images of 1000 steps would take minutes: only if they stopped is there room again soon.
    deadline_s = time.monotonic() + 20
    again = {"prompt": "house", "n": 8, "num_inference_steps": 1}
    while client.post(GENERATIONS, json=again).status_code != 200:
        assert time.monotonic() < deadline_s, "the work of clients that left goes on"
        time.sleep(0.2)


def test_urls_and_headers_have_limits(client: httpx.Client) -> None:
    too_long = client.get("/" + "a" * 10_000)
    too_many = client.get("/healthz", headers={f"X-{i}": "a" for i in range(200)})
    body = gzip.compress(json.dumps({"prompt": "red heart", "num_inference_steps": 4}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    compressed = client.post(GENERATIONS, content=body, headers=headers)

    assert [too_long.status_code, too_many.status_code, compressed.status_code] == [414, 431, 200]
    assert too_long.json()["error"]["code"] == "url_too_long"


def test_a_half_closed_connection_gets_its_image(client: httpx.Client) -> None:
    body = json.dumps({"prompt": "red heart", "num_inference_steps": 30}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=60) as half:
        half.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        half.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: half.recv(65536), b""))

    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"b64_json"' in received


def test_only_engines_step_back_behind_other_processes(service: Service) -> None:
    """Ray's workers would as a whole, and then a machine that is busy keeps models from loading."""
    assert service.process is not None
    root = psutil.Process(service.process.pid)
    (ingress,) = processes_of(root, INGRESS)
    (replica,) = processes_of(root, REPLICA)
    assert (ingress.nice(), replica.nice()) == (0, 0)
    threads = [os.getpriority(os.PRIO_PROCESS, thread.id) for thread in replica.threads()]
    assert max(threads) == EngineSettings().niceness
