"""The official client against a real server: it must work unchanged."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import openai
import pytest
from api_fakes import EMOJI, FakeBackend, raising
from stepserve.domain.errors import GenerationFailedError, ServerFullError
from stepserve.domain.model_status import ModelStatus


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
