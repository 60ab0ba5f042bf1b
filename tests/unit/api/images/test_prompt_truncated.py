"""What a text encoder did not read is told: in whole answers, streams, and to followers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
from api_fakes import FakeBackend, finish, run_through
from stepserve.domain.events import CutPrompt, Event, Finished, Outcome
from stepserve.domain.requests import GenerationRequest

URL = "/v1/images/generations"
CUTS = (
    CutPrompt("prompt", "text_encoder", 90, 77),
    CutPrompt("prompt", "text_encoder_2", 90, 77),
    CutPrompt("negative_prompt", "text_encoder", 80, 77),
)
TOLD = {
    "prompt": {"text_encoder": 77, "text_encoder_2": 77},
    "negative_prompt": {"text_encoder": 77},
}


async def finish_cut(request: GenerationRequest) -> Outcome:
    finished = await finish(request)
    assert isinstance(finished, Finished)
    return replace(finished, cut_prompts=CUTS)


async def stream_cut(request: GenerationRequest) -> AsyncIterator[Event]:
    async for event in run_through(request):
        yield replace(event, cut_prompts=CUTS) if isinstance(event, Finished) else event


async def test_an_answer_tells(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert "prompt_truncated" not in (await client.post(URL, json={"prompt": "cat"})).json()
    backend.generate_with(finish_cut)
    response = await client.post(URL, json={"prompt": "cat"})
    assert response.json()["prompt_truncated"] == TOLD


async def test_a_stream_and_its_followers_are_told(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.stream_with = stream_cut
    body = {"prompt": "cat", "stream": True}
    streamed = await client.post(URL, json=body, headers={"X-Request-ID": "one"})
    followed = await client.get("/v1/requests/one/events")
    for response in (streamed, followed):
        last = next(line for line in reversed(response.text.splitlines()) if line[:5] == "data:")
        assert json.loads(last.removeprefix("data: "))["prompt_truncated"] == TOLD
