"""Edits of models that take several images: forms and JSON, order, limits and sizes."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from api_fakes import EMOJI, FakeBackend, client_for
from PIL import Image
from stepserve.config import HttpSettings, Settings, UploadSettings
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.tasks import ONE, OPTIONAL, Count, Role, Task
from stepserve.routing.reports import job_of

DOCS = Path(__file__).parents[4] / "docs" / "api.md"
EDITS = "/v1/images/edits"
SETTINGS = Settings(
    http=HttpSettings(max_body_bytes=2_000_000, request_timeout_s=30),
    uploads=UploadSettings(max_pixels=40_000, max_total_pixels=60_000),
)
COLOURS = ("red", "green", "blue")


def file_of(colour: str, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def url_of(colour: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(file_of(colour)).decode()}"


def colours(files: tuple[bytes, ...]) -> list[object]:
    return [Image.open(io.BytesIO(file)).getpixel((0, 0)) for file in files]


WANTED = colours(tuple(map(file_of, COLOURS)))


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    tasks = {
        Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE},
        Task.EDIT: {
            Role.PROMPT: ONE,
            Role.IMAGE: Count(1, 16),
            Role.MASK: OPTIONAL,
            Role.IMAGE_GUIDANCE: OPTIONAL,
        },
    }
    backend.statuses = [ModelStatus(replace(EMOJI, tasks=tasks), ready=True)]
    return backend


@pytest.fixture
def client(backend: FakeBackend) -> httpx.AsyncClient:
    return client_for(backend, SETTINGS)


@pytest.mark.parametrize("names", [["image"] * 3, ["image[]"] * 3, ["image", "images", "images"]])
async def test_images_of_a_form_keep_their_order(
    client: httpx.AsyncClient, backend: FakeBackend, names: list[str]
) -> None:
    files = [(name, file_of(colour)) for name, colour in zip(names, COLOURS, strict=True)]
    response = await client.post(EDITS, data={"prompt": "blue"}, files=files)

    assert response.status_code == 200, response.text
    assert backend.requests[0].task is Task.EDIT
    assert colours(backend.requests[0].images) == WANTED
    assert "strength" not in response.json()["parameters"]


@pytest.mark.parametrize("field", ["image", "images"])
async def test_images_in_json_keep_their_order(
    client: httpx.AsyncClient, backend: FakeBackend, field: str
) -> None:
    first, *others = map(url_of, COLOURS)
    listed = [{"image_url": url} for url in others]
    body = {"image": first, "images": listed} if field == "image" else {"images": [first, *listed]}
    response = await client.post(EDITS, json={"prompt": "blue", **body})

    assert response.status_code == 200, response.text
    assert colours(backend.requests[0].images) == WANTED


async def test_sixteen_images_are_the_most(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    files = [("image[]", file_of("red", (16, 16)))] * 17
    responses = [
        await client.post(EDITS, data={"prompt": "blue"}, files=files[:count]) for count in (16, 17)
    ]

    assert [response.status_code for response in responses] == [200, 400]
    assert len(backend.requests[0].images) == 16
    error = responses[1].json()["error"]
    assert (error["param"], error["message"]) == ("image", "image must be 1 to 16 images, got 17")


async def test_all_pixels_of_a_request_are_counted(client: httpx.AsyncClient) -> None:
    files = [("image[]", file_of("red", (200, 150)))] * 3
    response = await client.post(EDITS, data={"prompt": "blue"}, files=files)

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (
        "image",
        "the 3 images of the request have 90000 pixels together; the limit is 60000 pixels: send "
        "smaller ones, or fewer",
    )


async def test_the_first_image_decides_the_size(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    files = [("image", file_of("red", (96, 48))), ("image", file_of("red", (64, 64)))]
    response = await client.post(EDITS, data={"prompt": "blue"}, files=files)

    assert response.json()["size"] == "96x48"
    assert (backend.requests[0].width, backend.requests[0].height) == (96, 48)


async def test_a_mask_is_as_large_as_the_first_image(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    images = [("image", file_of("red")), ("image", file_of("blue", (32, 32)))]
    good = [*images, ("mask", file_of("white"))]
    wrong = [*images, ("mask", file_of("white", (32, 32)))]
    responses = [
        await client.post(EDITS, data={"prompt": "blue"}, files=files) for files in (good, wrong)
    ]

    assert [response.status_code for response in responses] == [200, 400]
    assert backend.requests[0].task is Task.EDIT
    assert responses[1].json()["error"]["message"] == (
        "mask is 32x32 pixels and image 64x48: they must be equal"
    )


async def test_more_images_are_another_kind_of_step(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for count in (1, 2, 2):
        files = [("image", file_of("red"))] * count
        await client.post(EDITS, data={"prompt": "blue"}, files=files)
    await client.post("/v1/images/generations", json={"prompt": "blue", "size": "64x48"})
    jobs = [job_of(request, CLASSIC) for request in backend.requests]

    assert [job.size for job in jobs] == ["64x48+1", "64x48+2", "64x48+2", "64x48"]
    assert len({job.group for job in jobs}) == 3


def test_openais_client_sends_a_list(server_port: int, backend: FakeBackend) -> None:
    files = [(f"{colour}.png", file_of(colour)) for colour in COLOURS]
    url = f"http://127.0.0.1:{server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=10) as ai:
        response = ai.images.edit(image=files, prompt="blue", input_fidelity="high")

    assert response.data is not None
    assert colours(backend.requests[0].images) == WANTED


async def test_the_example_of_the_docs(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    text = DOCS.read_text().partition("### Edit by instruction")[2]
    body = json.loads(text.partition("```json")[2].partition("```")[0])
    for image, colour in zip(body["images"], COLOURS, strict=False):
        image["image_url"] = url_of(colour)
    response = await client.post(EDITS, json=body | {"model": "emoji", "size": "64x64"})

    assert response.status_code == 200, response.text
    assert colours(backend.requests[0].images) == WANTED[:2]
