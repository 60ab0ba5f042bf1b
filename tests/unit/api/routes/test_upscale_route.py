"""`POST /v1/images/upscale`: which images it takes, and what it makes of them."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, SETTINGS, FakeBackend, client_for
from PIL import Image
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import SizeRange
from stepserve.domain.tasks import ONE, OPTIONAL, Role, Task

URL = "/v1/images/upscale"
FOUR_TIMES = replace(
    EMOJI,
    sizes=SizeRange(minimum=32, maximum=256, step=32, native=128),
    tasks={Task.UPSCALING: {Role.PROMPT: OPTIONAL, Role.IMAGE: ONE, Role.NOISE_LEVEL: OPTIONAL}},
    upscale_factor=4,
    max_noise_level=350,
    max_n=1,
)
SENT = SETTINGS.model_copy(
    update={"http": SETTINGS.http.model_copy(update={"max_upload_bytes": 10**5})}
)


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.statuses = [ModelStatus(FOUR_TIMES, ready=True)]
    return backend


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


async def upscale(backend: FakeBackend, width: int = 24, height: int = 16, **body: Any) -> Any:
    address = f"data:image/png;base64,{base64.b64encode(png(width, height)).decode()}"
    async with client_for(backend, SENT) as client:
        return await client.post(URL, json={"image": address, **body})


def refusal(response: httpx.Response) -> tuple[str, str]:
    error = response.json()["error"]
    assert response.status_code == 400, error
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("given", "made"),
    # To the nearest size that the model takes.
    [((24, 16), "96x64"), ((8, 64), "32x256"), ((27, 21), "128x96")],
)
async def test_the_size_follows_from_the_image(
    backend: FakeBackend, given: tuple[int, int], made: str
):
    response = await upscale(backend, *given, prompt="heart", noise_level=20, seed=3)
    told = response.json()

    assert response.status_code == 200, told
    assert told["size"] == told["parameters"]["size"] == made
    assert told["parameters"]["noise_level"] == 20
    (request,) = backend.requests
    assert (request.task, request.size, request.noise_level) == (Task.UPSCALING, made, 20)
    assert request.strength is None


async def test_without_a_prompt_there_is_no_guidance(backend: FakeBackend):
    response = await upscale(backend)

    assert response.status_code == 200, response.text
    assert (backend.requests[0].prompt, backend.requests[0].guidance_scale) == ("", 1.0)


async def test_forms_hold_the_image_as_a_file(backend: FakeBackend):
    async with client_for(backend, SENT) as client:
        files = {"image": ("a.png", png(16, 16))}
        response = await client.post(URL, files=files, data={"size": "64x64"})

    assert response.status_code == 200, response.text
    assert response.json()["size"] == "64x64"


@pytest.mark.parametrize(
    ("size", "body", "param", "message"),
    [
        ((80, 16), {}, "image", "image is 80x16 pixels: each side must be 8 to 64 for model"),
        ((16, 3), {}, "image", "image is 16x3 pixels: each side must be 8 to 64 for model"),
        ((16, 16), {"size": "128x128"}, "size", "size 128x128 must be left out"),
        ((16, 16), {"noise_level": 351}, "noise_level", "noise_level must be 0 to 350, got 351"),
        ((16, 16), {"noise_level": -1}, "noise_level", "noise_level must be 0 to 350, got -1"),
        ((16, 16), {"n": 2}, "n", "n must be 1, got 2: model 'emoji' makes one image a request"),
        (
            (16, 16),
            {"negative_prompt": "fog"},
            "negative_prompt",
            "negative_prompt has no effect, as there is no prompt: send one",
        ),
        ((16, 16), {"strength": 0.5}, "strength", "/v1/images/edits takes it"),
        ((16, 16), {"hires": {}}, "hires", "/v1/images/generations takes it"),
    ],
)
async def test_what_is_wrong_is_named(
    backend: FakeBackend, size: tuple[int, int], body: dict[str, Any], param: str, message: str
):
    named, told = refusal(await upscale(backend, *size, **body))

    assert named == param
    assert message in told
    assert backend.requests == []


async def test_an_image_is_required(backend: FakeBackend):
    async with client_for(backend, SENT) as client:
        response = await client.post(URL, json={"prompt": "cat"})

    param, message = refusal(response)
    assert param == "image"
    assert message.startswith("image is required by upscaling with model 'emoji' (it takes: ")


async def test_other_models_say_what_they_do(backend: FakeBackend):
    backend.statuses = [ModelStatus(EMOJI, ready=True)]
    param, message = refusal(await upscale(backend))

    assert param == "model"
    assert message.startswith(
        "model 'emoji' does not enlarge images: it takes POST /v1/images/generations with a prompt"
    )
    assert "POST /v1/images/edits with an image" in message


@pytest.mark.parametrize(
    ("size", "larger"), [((15, 17), "32x36"), ((17, 15), "36x32"), ((17, 17), "36x36")]
)
async def test_both_sides_are_rounded_so_that_the_shape_is_kept(
    backend: FakeBackend, size: tuple[int, int], larger: str
):
    sizes = SizeRange(minimum=4, maximum=64, step=4, native=32)
    twice = replace(FOUR_TIMES, sizes=sizes, upscale_factor=2)
    backend.statuses = [ModelStatus(twice, ready=True)]

    assert (await upscale(backend, *size)).json()["size"] == larger


async def test_the_usual_noise_level_is_told(backend: FakeBackend):
    usual = replace(FOUR_TIMES, default_noise_level=20)
    backend.statuses = [ModelStatus(usual, ready=True)]
    told = (await upscale(backend)).json()

    assert told["parameters"]["noise_level"] == backend.requests[0].noise_level == 20


async def test_a_model_tells_its_factor(backend: FakeBackend):
    async with client_for(backend) as client:
        told = (await client.get("/v1/models/emoji")).json()

    assert (told["tasks"], told["upscale_factor"]) == (["upscaling"], 4)
    assert told["max_noise_level"] == 350
