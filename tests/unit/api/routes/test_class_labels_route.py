"""Models without a prompt over HTTP: what is sent in its place, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import ClassLabels
from stepserve.domain.tasks import ONE, Role, Task, TaskInputs

URL = "/v1/images/generations"
NAMES = {0: ("tench", "Tinca tinca"), 134: ("crane",), 281: ("tabby",), 517: ("crane",)}


@pytest.fixture(autouse=True)
def models(backend: FakeBackend) -> None:
    of_classes = {Task.CLASS_TO_IMAGE: {Role.CLASS_LABEL: ONE}}
    nothing: Mapping[Task, TaskInputs] = {Task.UNCONDITIONAL: {}}
    told = [
        EMOJI,
        replace(EMOJI, id="noise", tasks=nothing),
        replace(EMOJI, id="pets", tasks=of_classes, classes=ClassLabels(1000, NAMES)),
        replace(EMOJI, id="numbers", tasks=of_classes, classes=ClassLabels(10)),
    ]
    backend.statuses = [ModelStatus(model, ready=True) for model in told]


async def test_nothing_is_asked_of_a_model_that_takes_nothing(
    client: httpx.AsyncClient, backend: FakeBackend
):
    response = await client.post(URL, json={"model": "noise", "n": 2, "seed": 1})

    assert response.status_code == 200
    [request] = backend.requests
    assert (request.task, request.prompt, request.n) == (Task.UNCONDITIONAL, "", 2)
    again = await client.post(URL, json=response.json()["parameters"])
    assert again.json()["data"] == response.json()["data"]


@pytest.mark.parametrize(
    ("sent", "number"),
    [(7, 7), (7.0, 7), ("7", 7), ("tabby", 281), ("TINCA tinca", 0)],
)
async def test_a_class_is_a_number_or_a_name(
    client: httpx.AsyncClient, backend: FakeBackend, sent: object, number: int
):
    response = await client.post(URL, json={"model": "pets", "class_label": sent})
    again = await client.post(URL, json=response.json()["parameters"])

    assert (response.status_code, again.status_code) == (200, 200)
    assert {(r.task, r.class_label) for r in backend.requests} == {(Task.CLASS_TO_IMAGE, number)}
    assert response.json()["parameters"]["class_label"] == number


@pytest.mark.parametrize(
    ("model", "limits"), [("noise", (0, 0, 0)), ("pets", (0, 0, 0)), ("emoji", (64, 50, 77))]
)
async def test_models_without_prompts_take_none_of_them(
    client: httpx.AsyncClient, model: str, limits: tuple[int, int, int]
):
    told = (await client.get(f"/v1/models/{model}")).json()
    names = "max_prompts", "max_prompt_characters", "max_prompt_tokens"

    assert tuple(told[name] for name in names) == limits


async def test_an_edit_names_the_url_for_the_model_before_anything_that_is_missing(
    client: httpx.AsyncClient,
):
    response = await client.post("/v1/images/edits", json={"model": "pets"})

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert error["message"] == (
        "model 'pets' does not edit images: it takes POST /v1/images/generations with a class_label"
    )


async def test_a_form_names_it_too(client: httpx.AsyncClient, backend: FakeBackend):
    files: Any = {"model": (None, "pets"), "class_label": (None, "tabby")}
    response = await client.post(URL, files=files)

    assert response.status_code == 200, response.text
    assert backend.requests[0].class_label == 281


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (
            {"model": "noise", "prompt": "cat"},
            "prompt",
            "prompt must be left out: unconditional with model 'noise' does not take one (it "
            "takes: no input)",
        ),
        (
            {"model": "noise", "prompts": ["cat"]},
            "prompts",
            "prompts must be left out: model 'noise' takes no prompt",
        ),
        (
            {"model": "noise", "negative_prompt": "fog"},
            "negative_prompt",
            "negative_prompt must be left out: unconditional with model 'noise' takes no prompt",
        ),
        (
            {"model": "noise", "class_label": "cat"},
            "class_label",
            "class_label must be left out: unconditional with model 'noise' does not take one (it "
            "takes: no input)",
        ),
        (
            {"model": "emoji", "prompt": "cat", "class_label": 1},
            "class_label",
            "class_label must be left out: text-to-image with model 'emoji' does not take one (it "
            "takes: prompt, hires (optional))",
        ),
        (
            {"model": "pets"},
            "class_label",
            "class_label is required by class-to-image with model 'pets' (it takes: class_label)",
        ),
        (
            {"model": "pets", "class_label": "taby"},
            "class_label",
            "class_label 'taby' is not known; did you mean 'tabby'? (0 to 999, or a name that "
            "GET /v1/models/pets lists)",
        ),
        (
            {"model": "pets", "class_label": "crane"},
            "class_label",
            "class_label 'crane' is the name of several classes: send one of 134, 517",
        ),
        (
            {"model": "pets", "class_label": 1000},
            "class_label",
            "class_label must be 0 to 999, got 1000",
        ),
        (
            {"model": "pets", "class_label": "9" * 1500},
            "class_label",
            "class_label must be 0 to 999, got 999999999",
        ),
        (
            {"model": "pets", "class_label": -1},
            "class_label",
            "class_label must be 0 to 999, got -1",
        ),
        (
            {"model": "numbers", "class_label": "cat"},
            "class_label",
            "class_label 'cat' is no number: the classes of model 'numbers' have no names; send "
            "0 to 9",
        ),
        (
            {"model": "pets", "class_label": [1]},
            "class_label",
            "class_label must be the number of a class, or its name",
        ),
        (
            {"model": "pets", "class_label": True},
            "class_label",
            "class_label must be the number of a class, or its name",
        ),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    body: dict[str, Any],
    field: str,
    message: str,
):
    response = await client.post(URL, json=body)
    error = response.json()["error"]

    assert (response.status_code, error["param"], error["message"]) == (400, field, message)
    assert backend.requests == []


async def test_a_model_lists_its_classes(client: httpx.AsyncClient):
    pets = (await client.get("/v1/models/pets")).json()
    numbers = (await client.get("/v1/models/numbers")).json()
    emoji = (await client.get("/v1/models/emoji")).json()

    assert len(pets["classes"]) == 1000
    assert pets["classes"][0] == {"class_label": 0, "names": ["tench", "Tinca tinca"]}
    assert numbers["classes"][9] == {"class_label": 9, "names": []}
    assert emoji["classes"] == []
