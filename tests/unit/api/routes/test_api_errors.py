from __future__ import annotations

import gc
import json
import logging
import math
import weakref
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, Blocking, FakeBackend, client_for, raising
from hypothesis import given, settings
from hypothesis import strategies as st
from stepserve.api.errors import TABLE, error_response, kind_of
from stepserve.config import HttpSettings, Settings
from stepserve.domain import errors as domain_errors
from stepserve.domain.errors import (
    CancelledError,
    ExpiredError,
    GenerationFailedError,
    InvalidRequestError,
    NotReadyError,
    RefusedError,
    ServerFullError,
    StepserveError,
    UnmeetableDeadlineError,
)
from stepserve.domain.events import Failed, Outcome
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import GenerationRequest

URL = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error inside, after checking the shape that every error has."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


INVALID = [
    ({}, "prompt", "prompt is empty: text-to-image with model 'emoji' requires one"),
    ({"prompt": None}, "prompt", "prompt is empty"),
    ({"prompt": 4}, "prompt", "prompt must be a valid string, got 4"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": " \t\n"}, "prompt", "prompt is empty"),
    ({"prompt": "x" * 51}, "prompt", "prompt is 51 characters long; the limit is 50"),
    ({"prompt": "\ud800"}, "prompt", "not valid Unicode"),
    ({"prompt": "c", "negative_prompt": "x" * 60}, "negative_prompt", "60 characters long"),
    ({"prompt": "c", "n": "4"}, "n", "n must be a valid integer, got '4'"),
    ({"prompt": "c", "n": True}, "n", "n must be a valid integer, got true"),
    ({"prompt": "c", "n": 1.5}, "n", "n must be a valid integer"),
    ({"prompt": "c", "n": 0}, "n", "n must be 1 to 8, got 0"),
    ({"prompt": "c", "n": 9}, "n", "n must be 1 to 8, got 9"),
    ({"prompt": "c", "size": "64"}, "size", "'WIDTHxHEIGHT' in pixels, got '64'"),
    ({"prompt": "c", "size": "64x64 "}, "size", "got '64x64 '"),
    ({"prompt": "c", "size": "٦٤x٦٤"}, "size", "must be 'auto' or 'WIDTHxHEIGHT'"),
    ({"prompt": "c", "size": 64}, "size", "size must be a valid string, got 64"),
    ({"prompt": "c", "size": "64x65"}, "size", "size 64x65 is not accepted by 'emoji'"),
    ({"prompt": "c", "size": "0x0"}, "size", "48 to 128 in steps of 16"),
    ({"prompt": "c", "response_format": "link"}, "response_format", "'b64_json' or 'url'"),
    ({"prompt": "c", "response_format": "png"}, "response_format", "must be 'b64_json'"),
    ({"prompt": "c", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp', got"),
    ({"prompt": "c", "user": 1}, "user", "user must be a valid string"),
    ({"prompt": "c", "num_inference_steps": 0}, "num_inference_steps", "1 to 100, got 0"),
    ({"prompt": "c", "num_inference_steps": 101}, "num_inference_steps", "1 to 100, got 101"),
    ({"prompt": "c", "guidance_scale": "7"}, "guidance_scale", "valid number, got '7'"),
    ({"prompt": "c", "guidance_scale": True}, "guidance_scale", "valid number, got true"),
    ({"prompt": "c", "guidance_scale": -0.1}, "guidance_scale", "0 to 30, got -0.1"),
    ({"prompt": "c", "guidance_scale": 10**400}, "guidance_scale", "guidance_scale must be"),
    ({"prompt": "c", "seed": -1}, "seed", "0 to 9007199254740991"),
    ({"prompt": "c", "seed": 2**53}, "seed", "got 9007199254740992"),
    ({"prompt": "c", "seed": 10**1500}, "seed", "a number of 4983 bits"),
    ({"prompt": "c", "scheduler": "eular"}, "scheduler", "did you mean 'euler'?"),
    ({"prompt": "c", "guidance_start": 1}, "guidance_start", "less than 1, got 1"),
    ({"prompt": "c", "guidance_start": "0"}, "guidance_start", "valid number, got '0'"),
    ({"prompt": "c", "guidance_end": 1.5}, "guidance_end", "at most 1, got 1.5"),
    ({"prompt": "c", "priority": "high"}, "priority", "'normal' or 'batch', got 'high'"),
    (
        {"prompt": "c", "deadline_s": 0},
        "deadline_s",
        "deadline_s must be at least 0.001 seconds, got 0",
    ),
    ({"prompt": "c", "reproducible": "yes"}, "reproducible", "valid boolean, got 'yes'"),
    ({"prompt": "c", "sede": 1}, "sede", "unknown field 'sede'; did you mean 'seed'?"),
    ({"prompt": "c", "Prompt": "hd"}, "Prompt", "did you mean 'prompt'"),
    ({"prompt": "c", "partial_images": 4}, "partial_images", "must be 0 to 3, got 4"),
    ({"prompt": "c", "partial_images": 10**1500}, "partial_images", "a number of 4983 bits"),
    ({"prompt": "c", "previews": 51}, "previews", "must be 0 to 50, got 51"),
    ({"prompt": "c", "output_compression": 50}, "output_compression", "needs output_format 'jpeg'"),
    (
        {"prompt": "c", "output_compression": 101, "output_format": "webp"},
        "output_compression",
        "must be 0 to 100, got 101",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), INVALID)
async def test_invalid_values_are_named(
    client: httpx.AsyncClient, backend: FakeBackend, body: Any, param: str, message: str
):
    response = await client.post(URL, content=json.dumps(body), headers=JSON)
    error = error_of(response)

    assert response.status_code == 400
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert backend.requests == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
async def test_numbers_that_are_not_finite(client: httpx.AsyncClient, value: str):
    content = f'{{"prompt": "c", "guidance_scale": {value}}}'
    response = await client.post(URL, content=content, headers=JSON)

    assert response.status_code == 400
    assert error_of(response)["param"] == "guidance_scale"


async def test_all_problems_are_told_at_once(client: httpx.AsyncClient):
    response = await client.post(URL, json={"prompt": "c", "n": "1", "sede": 2})

    message = error_of(response)["message"]
    assert "n must be" in message
    assert "sede" in message


@pytest.mark.parametrize("content", ["[]", '"cat"', "null", "4", ""])
async def test_body_that_is_no_object(client: httpx.AsyncClient, content: str):
    response = await client.post(URL, content=content, headers=JSON)

    assert response.status_code == 400
    assert error_of(response)["message"] == "the body must be a JSON object"


@pytest.mark.parametrize(
    "content", ["{", "{'prompt': 1}", b'{"prompt": "\xff"}', "[" * 1900, '{"seed": ' + "9" * 1900]
)
async def test_malformed_json(client: httpx.AsyncClient, content: str | bytes):
    response = await client.post(URL, content=content, headers=JSON)

    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


async def test_malformed_json_says_where(client: httpx.AsyncClient):
    response = await client.post(URL, content='{"prompt" "c"}', headers=JSON)

    message = error_of(response)["message"]
    assert message == "the body is not valid JSON: Expecting ':' delimiter (at character 10)"


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
async def test_body_not_declared_as_json(client: httpx.AsyncClient, headers: dict[str, str]):
    response = await client.post(URL, content='{"prompt": "c"}', headers=headers)

    assert response.status_code == 415
    error = error_of(response)
    assert error["code"] == "unsupported_media_type"
    # RFC 9110 12.5.3: it would mean that the coding was wrong.
    assert "accept-encoding" not in response.headers
    assert "application/json" in error["message"]


async def test_what_curl_sends_by_itself_says_how_to_declare_it(client: httpx.AsyncClient):
    message = error_of(await client.post(URL, data={"prompt": "c"}))["message"]

    assert "use -F instead; or to send JSON, add -H 'Content-Type: application/json'" in message


async def test_json_with_a_charset_is_json(client: httpx.AsyncClient):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = await client.post(URL, content='{"prompt": "c"}', headers=headers)

    assert response.status_code == 200


async def test_unknown_model(client: httpx.AsyncClient):
    response = await client.post(URL, json={"prompt": "c", "model": "emjoi"})

    assert response.status_code == 404
    assert error_of(response) == {
        "message": "no model 'emjoi'; did you mean 'emoji'? (served: emoji)",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_unknown_url(client: httpx.AsyncClient):
    response = await client.get("/v1/image")

    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "unknown_url"
    assert "GET '/v1/image'" in error["message"]


async def test_wrong_method(client: httpx.AsyncClient):
    response = await client.get(URL)

    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"


def failed(error: StepserveError) -> Any:
    async def generate(request: GenerationRequest) -> Outcome:
        return Failed(request.id, error)

    return generate


@pytest.mark.parametrize("way", [raising, failed])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (ServerFullError("64 requests wait", 2.1), 429, "server_full", "3"),
        (ServerFullError("64 requests wait", 0.0), 429, "server_full", "1"),
        (NotReadyError("draining", 7.0), 503, "not_ready", "7"),
        (RefusedError("no", math.inf), 503, "refused", "3600"),
        (InvalidRequestError("odd", "seed"), 400, "invalid_value", None),
        (CancelledError("stopped"), 499, "request_cancelled", None),
        (ExpiredError("too late"), 504, "deadline_exceeded", None),
    ],
)
async def test_errors_of_the_backend(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    way: Any,
    error: StepserveError,
    status: int,
    code: str,
    retry_after: str | None,
):
    backend.generate_with(way(error))
    response = await client.post(URL, json={"prompt": "c"})

    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    told = error_of(response)
    assert (told["code"], told["message"]) == (code, error.message)


@pytest.mark.parametrize("way", [raising, failed])
async def test_a_deadline_that_is_refused_tells_what_could_be_promised(
    client: httpx.AsyncClient, backend: FakeBackend, way: Any
):
    message = "deadline_s is 2, but this request can only be promised within 3.4 s"
    backend.generate_with(way(UnmeetableDeadlineError(message, 1.4, 3.4)))
    response = await client.post(URL, json={"prompt": "c", "deadline_s": 2})

    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json() == {
        "error": {
            "message": message,
            "type": "rate_limit_error",
            "param": "deadline_s",
            "code": "deadline_unmeetable",
            "expected_s": 3.4,
        }
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GenerationFailedError("failed: OSError: /secret/path"), "generation_failed"),
        (RuntimeError("/secret/path"), "internal_error"),
        (StepserveError("/secret/path"), "internal_error"),
    ],
)
async def test_internals_go_to_the_log_only(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: str,
):
    backend.generate_with(raising(error))
    headers = {"X-Request-ID": "find-me"}
    response = await client.post(URL, json={"prompt": "c"}, headers=headers)

    assert response.status_code == 500
    told = error_of(response)
    assert (told["type"], told["code"]) == ("server_error", code)
    assert "secret" not in told["message"]
    assert "find-me" in told["message"]
    assert response.headers["x-request-id"] == "find-me"
    assert "find-me" in caplog.text
    assert "/secret/path" in caplog.text


async def test_a_bug_in_listing_models_is_answered_too(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
):
    backend.statuses = None  # type: ignore[assignment]
    caplog.set_level(logging.CRITICAL)

    assert error_of(await client.get("/v1/models"))["code"] == "internal_error"


async def test_model_that_is_not_ready(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = [ModelStatus(EMOJI, ready=False, detail="loading weights")]
    response = await client.post(URL, json={"prompt": "c"})

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["message"] == "not ready: emoji (loading weights)"
    assert backend.requests == []


async def test_invalid_is_told_before_not_ready(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = [ModelStatus(EMOJI, ready=False)]
    response = await client.post(URL, json={"prompt": "c", "n": 99})

    assert response.status_code == 400


async def test_timeout(backend: FakeBackend):
    blocking = Blocking()
    backend.generate_with(blocking)
    async with client_for(backend, Settings(http=HttpSettings(request_timeout_s=0.01))) as client:
        response = await client.post(URL, json={"prompt": "c"})

    assert response.status_code == 504
    assert error_of(response)["code"] == "timeout"
    assert "0.01 s" in error_of(response)["message"]
    assert blocking.cancelled.is_set()


def test_every_error_class_has_a_row():
    for error_class in vars(domain_errors).values():
        if isinstance(error_class, type) and issubclass(error_class, StepserveError):
            assert any(base in TABLE for base in error_class.__mro__)


def test_subclasses_are_answered_like_their_nearest_parent():
    class OurServerFullError(ServerFullError):
        pass

    assert kind_of(OurServerFullError("x", 1)).status == 429
    assert kind_of(KeyError("x")).status == 500


def test_field_survives_where_the_error_has_one():
    body = error_response(InvalidRequestError("odd", "seed"), "id").body

    assert b'"param":"seed"' in bytes(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["prompt", "n", "size", "seed", "scheduler", "guidance_scale", "model"])


@settings(max_examples=60, deadline=None)
@given(body=st.dictionaries(FIELDS | st.text(), JSON_VALUES, max_size=5))
async def test_no_body_at_all_is_a_server_error(body: dict[str, Any]):
    backend = FakeBackend()
    async with client_for(backend, Settings()) as client:
        response = await client.post(URL, content=json.dumps(body), headers=JSON)

    assert response.status_code in {200, 400, 404}
    if response.status_code != 200:
        error_of(response)


def test_an_answer_keeps_nothing_of_the_frames_that_its_error_passed_through():
    class File:
        """Stands for the bytes of a body."""

    def read(file: File) -> None:
        try:
            raise ValueError("a decoder's")
        except ValueError as error:
            raise InvalidRequestError("image cannot be read", "image") from error

    def handle() -> tuple[weakref.ref[File], object]:
        file = File()
        try:
            read(file)
        except InvalidRequestError as error:
            response = error_response(error, "r")
        return weakref.ref(file), response

    gc.disable()
    try:
        file, response = handle()
        assert response is not None
        assert file() is None
    finally:
        gc.enable()
