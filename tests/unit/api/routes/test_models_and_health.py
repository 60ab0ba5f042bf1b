from __future__ import annotations

from dataclasses import asdict, replace

import httpx
import pytest
from api_fakes import EMOJI, FINGERPRINT, FakeBackend
from stepserve import __version__
from stepserve.domain.model_status import ModelStatus

GENERATIONS = "/v1/images/generations"
LOADING = ModelStatus(replace(EMOJI, id="sd"), ready=False, detail="loading weights")


async def test_models_are_listed_with_limits(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses.append(LOADING)
    body = (await client.get("/v1/models")).json()

    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["emoji", "sd"]
    assert [model["ready"] for model in body["data"]] == [True, False]
    assert body["data"][1]["detail"] == "loading weights"
    emoji = body["data"][0]
    assert (emoji["object"], emoji["owned_by"]) == ("model", "stepserve")
    assert emoji["sizes"] == {"minimum": 48, "maximum": 128, "step": 16, "native": 64}
    assert emoji["schedulers"] == ["ddim", "euler"]
    assert emoji["max_num_inference_steps"] == 100
    assert emoji["tasks"] == ["text-to-image", "inpainting"]
    assert emoji["guidance_interval"] is True


async def test_models_tell_their_whole_fingerprint(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses.append(ModelStatus(replace(EMOJI, id="sd", fingerprint=None), ready=False))
    told, loading = (
        model["fingerprint"] for model in (await client.get("/v1/models")).json()["data"]
    )
    whole = asdict(FINGERPRINT) | {"digest": FINGERPRINT.digest, "short": FINGERPRINT.short}
    assert told == whole
    assert loading is None


async def test_one_model(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses.append(LOADING)
    everything = (await client.get("/v1/models")).json()["data"]

    assert (await client.get("/v1/models/sd")).json() == everything[1]


async def test_an_alias_is_as_good_as_an_id(client: httpx.AsyncClient, backend: FakeBackend):
    aliased = replace(EMOJI, aliases=("gpt-image-1", "dall-e-3"))
    backend.statuses = [ModelStatus(aliased, ready=True)]
    shown = (await client.get("/v1/models/gpt-image-1")).json()
    drawn = await client.post(GENERATIONS, json={"prompt": "cat", "model": "gpt-image-1"})
    batch = await client.get("/v1/models/dall-e-3/batch")

    assert (shown["id"], shown["aliases"]) == ("emoji", ["gpt-image-1", "dall-e-3"])
    assert (await client.get("/v1/models/emoji")).json() == shown
    assert (drawn.json()["model"], backend.requests[0].model) == ("emoji", "emoji")
    assert "b64_json" in drawn.json()["data"][0]
    assert batch.json()["model"] == "emoji"


async def test_an_alias_of_a_model_that_is_only_just_listed(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    aliased = ModelStatus(replace(EMOJI, aliases=("gpt-image-1",)), ready=True)
    backend.statuses = []

    async def look(model_id: str) -> ModelStatus | None:
        found = backend.statuses and model_id == "emoji"
        backend.statuses = [aliased]
        return aliased if found else None

    monkeypatch.setattr(backend, "model", look)

    assert (await client.get("/v1/models/gpt-image-1")).json()["id"] == "emoji"


async def test_no_name_is_an_alias_by_itself(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = [ModelStatus(replace(EMOJI, aliases=("dall-e-3",)), ready=True)]
    response = await client.post(GENERATIONS, json={"prompt": "cat", "model": "dall-e-2"})

    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert message == "no model 'dall-e-2'; did you mean 'dall-e-3'? (served: emoji, dall-e-3)"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "url"),
        ({"response_format": None}, "url"),
        ({"response_format": "b64_json"}, "b64_json"),
    ],
)
async def test_dall_e_answers_with_links(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], key: str
):
    backend.statuses = [ModelStatus(replace(EMOJI, aliases=("dall-e-3",)), ready=True)]
    body = {"prompt": "cat", "model": "dall-e-3"} | fields
    [image] = (await client.post(GENERATIONS, json=body)).json()["data"]

    assert set(image) == {key, "seed"}


async def test_unknown_model(client: httpx.AsyncClient):
    response = await client.get("/v1/models/emoj")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "did you mean 'emoji'?" in response.json()["error"]["message"]


async def test_healthz_asks_no_model(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = []
    response = await client.get("/healthz")

    assert response.status_code == 200
    assert response.json() == {"status": "ok", "version": __version__}


async def test_readyz_tells_of_each_model(client: httpx.AsyncClient, backend: FakeBackend):
    everything = {"status": "ready", "models": ["emoji"], "not_ready": {}, "results": ""}
    assert (await client.get("/readyz")).json() == everything

    backend.statuses.append(LOADING)
    response = await client.get("/readyz")

    assert response.status_code == 200
    assert response.json() == everything | {"not_ready": {"sd": "loading weights"}}


async def test_readyz_until_a_model_is_ready(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = [LOADING]
    response = await client.get("/readyz")

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "not_ready"
    assert response.json()["error"]["message"] == "not ready: sd (loading weights)"


async def test_readyz_without_any_model(client: httpx.AsyncClient, backend: FakeBackend):
    backend.statuses = []

    assert (await client.get("/readyz")).status_code == 503


async def test_no_cross_origin_access(client: httpx.AsyncClient):
    response = await client.get("/healthz", headers={"Origin": "http://elsewhere"})

    assert "access-control-allow-origin" not in response.headers
