"""Images that the model's own safety checker withheld: whole answers, links, streams, followers."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend, finish, raising, run_through
from stepserve.domain.errors import ContentFilteredError
from stepserve.domain.events import Event, Failed, Finished, Outcome, Preview
from stepserve.domain.requests import GenerationRequest

URL = "/v1/images/generations"
MESSAGE = "the safety checker of model emoji withheld all images of the request"


async def finish_with_one_withheld(request: GenerationRequest) -> Outcome:
    return _with_one_withheld(await finish(request))


def _with_one_withheld(event: Event) -> Any:
    """The second image is."""
    assert isinstance(event, Finished | Preview)
    first, second, *others = event.images
    second = replace(second, data=b"", content_filtered=True)
    return replace(event, images=(first, second, *others))


async def stream_with_one_withheld(request: GenerationRequest) -> AsyncIterator[Event]:
    async for event in run_through(request):
        yield _with_one_withheld(event) if isinstance(event, Finished | Preview) else event


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [dict(line.split(": ", 1) for line in b.split("\n")) for b in text.split("\n\n") if b]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


@pytest.mark.parametrize("wanted", ["b64_json", "url"])
async def test_the_others_are_answered(
    client: httpx.AsyncClient, backend: FakeBackend, wanted: str
) -> None:
    backend.generate_with(finish_with_one_withheld)
    body = {"prompt": "cat", "n": 3, "seed": 5, "response_format": wanted}
    response = await client.post(URL, json=body)

    assert response.status_code == 200
    data = response.json()["data"]
    assert data[1] == {"seed": 6, "content_filtered": True}
    assert [sorted(one) for one in (data[0], data[2])] == [sorted((wanted, "seed"))] * 2


async def test_where_none_is_left_it_is_openais_error(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.generate_with(raising(ContentFilteredError(MESSAGE)))
    response = await client.post(URL, json={"prompt": "cat"})

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": MESSAGE,
        "type": "image_generation_user_error",
        "param": None,
        "code": "moderation_blocked",
    }


async def test_a_stream_tells_of_it(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.stream_with = stream_with_one_withheld
    body = {"prompt": "cat", "n": 2, "seed": 5, "stream": True, "partial_images": 1}
    events = parse((await client.post(URL, json=body)).text)

    partial = [data for name, data in events if name.endswith("partial_image")]
    assert [data["image_index"] for data in partial] == [0]
    first, second = (data for name, data in events if name.endswith("completed"))
    assert base64.b64decode(first["b64_json"]) == b"seed 5"
    assert "content_filtered" not in first
    assert (second["image_index"], second["seed"], second["content_filtered"]) == (1, 6, True)
    assert not {"b64_json", "url"} & second.keys()


async def test_a_stream_without_any_ends_with_the_error(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    async def blocked(request: GenerationRequest) -> AsyncIterator[Event]:
        async for event in run_through(request):
            if isinstance(event, Finished):
                yield Failed(request.id, ContentFilteredError(MESSAGE))
            else:
                yield event

    backend.stream_with = blocked
    name, data = parse((await client.post(URL, json={"prompt": "cat", "stream": True})).text)[-1]
    assert (name, data["error"]["code"]) == ("error", "moderation_blocked")


async def test_who_follows_a_request_is_told(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.stream_with = stream_with_one_withheld
    body = {"prompt": "cat", "n": 2, "seed": 5, "stream": True, "partial_images": 1}
    await client.post(URL, json=body, headers={"X-Request-ID": "one"})
    followed = await client.get("/v1/requests/one/events")

    told = dict(parse(followed.text.replace("\nid: ", "\nx: ")))
    assert len(told["preview"]["images"]) == 1
    assert (told["finished"]["seeds"], told["finished"]["content_filtered"]) == ([5, 6], [6])


def test_the_error_survives_a_process_border() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ContentFilteredError(MESSAGE)))
    assert (type(error), error.message) == (ContentFilteredError, MESSAGE)
