"""Reference images over HTTP: in JSON and in forms, with scales and adapters of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend, client_for, data_url, image_file
from stepserve.config import Settings, UploadSettings
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import ReferenceUse
from stepserve.domain.tasks import Count, Role, Task
from usual_tasks import USUAL_TASKS

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
SETTINGS = Settings(uploads=UploadSettings(max_bytes=50_000, max_pixels=40_000))


RED, BLUE = image_file("red"), image_file("blue")


def backend_with(*ip_adapters: str) -> FakeBackend:
    inputs = {Role.REFERENCE: Count(0, 2)} if ip_adapters else {}
    tasks = {task: {**USUAL_TASKS[task], **inputs} for task in USUAL_TASKS}
    backend = FakeBackend()
    capabilities = replace(EMOJI, tasks=tasks, ip_adapters=ip_adapters)
    backend.statuses = [ModelStatus(capabilities, ready=True)]
    return backend


async def post(backend: FakeBackend, url: str = GENERATIONS, **sent: Any) -> httpx.Response:
    return await client_for(backend, SETTINGS).post(url, **sent)


async def test_references_have_scales_and_adapters_of_their_own() -> None:
    backend = backend_with("style", "face")
    references = [
        {"image": data_url(RED), "scale": 0.3, "adapter": "face"},
        {"image": {"image_url": data_url(BLUE)}, "adapter": "style"},
    ]
    response = await post(backend, json={"prompt": "cat", "references": references})

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.TEXT_TO_IMAGE
    assert request.references == (
        ReferenceUse(RED, 0.3, "face"),
        ReferenceUse(BLUE, 0.6, "style"),
    )
    assert response.json()["parameters"]["references"] == [
        {"scale": 0.3, "adapter": "face"},
        {"scale": 0.6, "adapter": "style"},
    ]


async def test_a_request_without_references_says_nothing_of_them() -> None:
    response = await post(backend_with("style"), json={"prompt": "cat"})
    assert "references" not in response.json()["parameters"]


async def test_a_form_has_files_in_the_places_of_images() -> None:
    backend = backend_with("style")
    uses = [{"scale": 0.3}, {"image": data_url(RED)}, {"scale": 1}]
    files = [("reference_image", BLUE), ("reference_image[]", RED)]
    form = {"prompt": "cat", "references": json.dumps(uses[:1] + uses[2:])}
    response = await post(backend, data=form, files=files)
    assert response.status_code == 200, response.text
    form = {"prompt": "cat", "references": json.dumps(uses[1:])}
    response = await post(backend, data=form, files=files[:1])
    assert response.status_code == 200, response.text

    assert [request.references for request in backend.requests] == [
        (ReferenceUse(BLUE, 0.3), ReferenceUse(RED, 1)),
        (ReferenceUse(RED), ReferenceUse(BLUE, 1)),
    ]


async def test_a_form_may_have_files_alone_and_images_beside_them() -> None:
    backend = backend_with("style")
    files = {"image": RED, "reference_image": BLUE}
    response = await post(backend, EDITS, data={"prompt": "cat"}, files=files)

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.IMAGE_TO_IMAGE
    assert (request.images, request.references) == ((RED,), (ReferenceUse(BLUE),))


@pytest.mark.parametrize(
    ("references", "said"),
    [
        ([{"image": data_url(RED), "scale": -0.1}], "references[0].scale must be 0 to 5, got -0.1"),
        ([{"image": data_url(RED), "scale": 5.5}], "references[0].scale must be 0 to 5, got 5.5"),
        ([{"image": data_url(RED), "adapter": "stile"}], "did you mean 'style'? (known: style)"),
        ([{"scale": 0.5}], "references[0].image is required: send a 'data:' URL"),
        ([{"image": data_url(b"no image at all")}], "references[0].image"),
        ([{"image": "file:///etc/passwd"}], "references[0].image"),
        ([{"image": data_url(RED)}] * 3, "references must be 0 to 2 for text-to-image with model"),
        ([{"image": data_url(RED), "scle": 1}], "did you mean 'scale'?"),
        ({"image": data_url(RED)}, "references must be a list such as [{"),
    ],
)
async def test_wrong_references_are_refused_with_what_is_taken(references: Any, said: str) -> None:
    backend = backend_with("style")
    response = await post(backend, json={"prompt": "cat", "references": references})
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert error["param"].startswith("references")
    assert backend.requests == []


async def test_an_adapter_must_be_named_where_there_are_several() -> None:
    body = {"prompt": "cat", "references": [{"image": data_url(RED)}]}
    response = await post(backend_with("style", "face"), json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "references[0].adapter"
    assert response.json()["error"]["message"] == (
        "references[0].adapter is required: model 'emoji' has several (style, face)"
    )


async def test_a_model_without_ip_adapters_takes_no_references() -> None:
    body = {"prompt": "cat", "references": [{"image": data_url(RED)}]}
    response = await post(backend_with(), json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(
        "references must be left out: text-to-image with model 'emoji' does not take one"
    )
    assert error["param"] == "references"


async def test_more_files_than_references_are_refused() -> None:
    form = {"prompt": "cat", "references": "[{}]"}
    files = [("reference_image", RED), ("reference_image", BLUE)]
    response = await post(backend_with("style"), data=form, files=files)
    assert response.status_code == 400
    assert "reference_image must be one file for each entry of references" in response.text
    assert response.json()["error"]["param"] == "reference_image"


@pytest.mark.parametrize("name", ["ip_adapter_image", "reference", "referenses"])
async def test_other_names_of_the_field_are_not_set_aside(name: str) -> None:
    response = await post(backend_with("style"), json={"prompt": "cat", name: data_url(RED)})
    assert response.status_code == 400
    assert "did you mean 'references'?" in response.json()["error"]["message"]


async def test_a_model_lists_its_ip_adapters() -> None:
    client = client_for(backend_with("style", "face"), SETTINGS)
    told = (await client.get("/v1/models/emoji")).json()
    assert told["ip_adapters"] == ["style", "face"]
    assert told["inputs"]["text-to-image"]["references"] == {"least": 0, "most": 2}
