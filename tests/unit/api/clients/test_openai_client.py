"""The official client against a real server: it must work unchanged."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest
from api_fakes import EMOJI, FakeBackend, raising
from PIL import Image
from stepserve.domain.errors import GenerationFailedError, ServerFullError
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import Control, ControlKind
from stepserve.domain.tasks import Count, Role, Task
from usual_tasks import USUAL_TASKS


@pytest.fixture
def ai(server_port: int) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=10) as client:
        yield client


def test_generate(ai: openai.OpenAI, backend: FakeBackend):
    response = ai.images.generate(
        prompt="cat",
        model="emoji",
        n=2,
        size="auto",
        response_format="b64_json",
        output_format="webp",
        user="someone",
        extra_body={"seed": 5, "num_inference_steps": 7},
    )

    assert response.created > 0
    assert response.data is not None
    images = [base64.b64decode(image.b64_json or "") for image in response.data]
    assert images == [b"seed 5", b"seed 6"]
    assert (response.output_format, response.size) == ("webp", "64x64")
    assert response.model_extra is not None
    assert response.model_extra["seed"] == 5
    assert backend.requests[0].num_inference_steps == 7


def test_edit_with_lists_in_extra_body(ai: openai.OpenAI, backend: FakeBackend):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    control = Control("depth", ControlKind.CONTROLNET)
    taken = {**USUAL_TASKS[Task.IMAGE_TO_IMAGE], Role.CONTROL: Count(0, 2)}
    capabilities = replace(EMOJI, tasks={Task.IMAGE_TO_IMAGE: taken}, controls=(control,))
    backend.statuses = [ModelStatus(capabilities, ready=True)]
    controls = [
        {"name": "depth", "image": address, "scale": 0.5},
        {"name": "depth", "image": address, "scale": 1},
    ]

    ai.images.edit(image=[file.getvalue()], prompt="cat", extra_body={"controls": controls})

    uses = backend.requests[0].controls
    assert [(use.name, use.image, use.scale) for use in uses] == [
        ("depth", file.getvalue(), 0.5),
        ("depth", file.getvalue(), 1.0),
    ]


def test_models(ai: openai.OpenAI):
    assert [model.id for model in ai.models.list()] == ["emoji"]
    assert ai.models.retrieve("emoji").owned_by == "stepserve"


def test_bad_request(ai: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.images.generate(prompt="cat", n=99)

    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
    assert caught.value.type == "invalid_request_error"
    assert "n must be 1 to 8, got 99" in str(caught.value)


def test_unknown_model(ai: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        ai.images.generate(prompt="cat", model="dall-e-3")

    assert caught.value.code == "model_not_found"


def test_server_full(ai: openai.OpenAI, backend: FakeBackend):
    backend.generate_with(raising(ServerFullError("64 requests wait", 3)))
    with pytest.raises(openai.RateLimitError) as caught:
        ai.images.generate(prompt="cat")

    assert caught.value.response.headers["retry-after"] == "3"


def test_failures_of_the_server(ai: openai.OpenAI, backend: FakeBackend):
    backend.generate_with(raising(GenerationFailedError("boom")))
    with pytest.raises(openai.InternalServerError) as failed:
        ai.images.generate(prompt="cat")
    backend.statuses = [ModelStatus(EMOJI, ready=False)]
    with pytest.raises(openai.InternalServerError) as loading:
        ai.images.generate(prompt="cat")

    assert (failed.value.status_code, loading.value.status_code) == (500, 503)
    assert failed.value.request_id
