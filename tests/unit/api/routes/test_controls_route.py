"""Control images over HTTP: in JSON and in forms, each with what it says for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend, client_for, data_url, image_file
from stepserve.config import Settings, UploadSettings
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import Control, ControlKind
from stepserve.domain.requests import ControlUse
from stepserve.domain.tasks import Count, Role, Task
from usual_tasks import USUAL_TASKS

DOCS = Path(__file__).parents[4] / "docs" / "api.md"
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
SETTINGS = Settings(uploads=UploadSettings(max_bytes=50_000, max_pixels=40_000))
CANNY = Control("canny", ControlKind.CONTROLNET, preprocessor="canny")
DEPTH = Control("depth", ControlKind.CONTROLNET, loaded=True, memory_bytes=1000)
SKETCH = Control("sketch", ControlKind.T2I_ADAPTER, takes_interval=False)


RED, BLUE = image_file("red"), image_file("blue")


def backend_with(*controls: Control) -> FakeBackend:
    inputs = {Role.CONTROL: Count(0, 2)} if controls else {}
    tasks = {task: {**USUAL_TASKS[task], **inputs} for task in USUAL_TASKS}
    backend = FakeBackend()
    backend.statuses = [ModelStatus(replace(EMOJI, tasks=tasks, controls=controls), ready=True)]
    return backend


async def post(backend: FakeBackend, url: str = GENERATIONS, **sent: Any) -> httpx.Response:
    return await client_for(backend, SETTINGS).post(url, **sent)


async def test_several_controls_at_once_each_with_its_own_settings() -> None:
    backend = backend_with(CANNY, DEPTH)
    controls = [
        {"name": "canny", "image": data_url(RED), "scale": 0.7, "start": 0.1, "end": 0.8},
        {"name": "depth", "image": {"image_url": data_url(BLUE)}, "preprocessor": "invert"},
    ]
    response = await post(backend, json={"prompt": "cat", "controls": controls})

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.TEXT_TO_IMAGE
    assert request.controls == (
        ControlUse("canny", RED, 0.7, 0.1, 0.8, "canny"),
        ControlUse("depth", BLUE, preprocessor="invert"),
    )
    told = response.json()["parameters"]["controls"]
    assert told[0] == {
        "name": "canny",
        "scale": 0.7,
        "start": 0.1,
        "end": 0.8,
        "preprocessor": "canny",
    }


async def test_the_only_control_needs_no_name_and_its_preprocessor_can_be_left_out() -> None:
    backend = backend_with(CANNY)
    controls = [{"image": data_url(RED)}, {"image": data_url(RED), "preprocessor": "none"}]
    response = await post(backend, json={"prompt": "cat", "controls": controls})
    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.controls == (
        ControlUse("canny", RED, preprocessor="canny"),
        ControlUse("canny", RED, preprocessor="none"),
    )


async def test_a_form_has_files_in_the_places_of_images() -> None:
    backend = backend_with(CANNY, DEPTH)
    controls = json.dumps([{"name": "depth"}, {"name": "canny", "scale": 0.5}])
    files = [("control_image", BLUE), ("control_image[]", RED), ("image", RED)]
    form = {"prompt": "cat", "controls": controls}
    response = await post(backend, EDITS, data=form, files=files)

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.IMAGE_TO_IMAGE
    assert request.images == (RED,)
    assert request.controls == (
        ControlUse("depth", BLUE),
        ControlUse("canny", RED, 0.5, preprocessor="canny"),
    )


async def test_the_example_of_the_docs_is_served() -> None:
    text = DOCS.read_text().partition("## Steer with a control image")[2]
    body = json.loads(text.partition("```json")[2].partition("```")[0])
    blank, file = "data:image/png;base64,iVBORw0KGgo=", data_url(RED)
    assert body["controls"][0]["image"] == body["controls"][1]["image"]["image_url"] == blank
    body["controls"][0]["image"] = body["controls"][1]["image"]["image_url"] = file
    backend = backend_with(CANNY, DEPTH)
    response = await post(backend, json=body | {"model": "emoji"})
    assert response.status_code == 200, response.text
    assert [use.name for use in backend.requests[0].controls] == ["canny", "depth"]


async def test_models_list_their_controls() -> None:
    client = client_for(backend_with(CANNY, DEPTH, SKETCH), SETTINGS)
    model = (await client.get("/v1/models/emoji")).json()
    assert model["inputs"]["text-to-image"]["controls"] == {"least": 0, "most": 2}
    assert model["controls"][1] == {
        "name": "depth",
        "kind": "controlnet",
        "loaded": True,
        "memory_bytes": 1000,
        "preprocessor": "",
        "takes_scale": True,
        "takes_interval": True,
        "problem": "",
    }


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ([{"name": "cany", "image": data_url(RED)}], "'cany' is not known; did you mean 'canny'?"),
        (
            [{"image": data_url(RED)}],
            "controls[0].name is required: model 'emoji' has canny, sketch",
        ),
        ([{"name": "canny"}], "controls[0].image is required: send a 'data:' URL"),
        ([{"name": "canny", "image": data_url(RED), "scale": 11}], "must be 0 to 10, got 11.0"),
        ([{"name": "canny", "image": data_url(RED), "start": -1}], "must be at least 0 and less"),
        ([{"name": "canny", "image": data_url(RED), "end": 1.5}], "at most 1, got 1.5"),
        ([{"name": "sketch", "image": data_url(RED), "end": 0.5}], "steers at every step"),
        (
            [{"name": "canny", "image": data_url(RED), "preprocessor": "hed"}],
            "must be one of canny",
        ),
        ([{"name": "canny", "image": data_url(RED)}] * 3, "controls must be 0 to 2 for text-to-im"),
        ([{"name": "canny", "image": data_url(b"no image")}], "controls[0].image"),
        ([{"name": "canny", "image": data_url(RED), "strength": 1}], "strength"),
    ],
)
async def test_wrong_controls_are_refused_with_what_is_taken(controls: Any, said: str) -> None:
    backend = backend_with(CANNY, SKETCH)
    response = await post(backend, json={"prompt": "cat", "controls": controls})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert said in error["message"]
    assert error["param"].startswith("controls")
    assert backend.requests == []


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": "cany"}, "name"),
        ({"name": ""}, "name"),
        ({"scale": 11}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"start": 1}, "start"),
        ({"end": 0}, "end"),
        ({"name": "sketch", "start": 0.5}, "start"),
        ({"name": "sketch", "end": 0.5}, "end"),
        ({"preprocessor": "hed"}, "preprocessor"),
        ({"image": None}, "image"),
    ],
)
async def test_the_field_of_the_entry_is_named(wrong: dict[str, Any], field: str) -> None:
    right = {"name": "canny", "image": data_url(RED)}
    controls = [right, {**right, **wrong}]
    response = await post(backend_with(CANNY, SKETCH), json={"prompt": "c", "controls": controls})
    error = response.json()["error"]
    assert error["param"] == f"controls[1].{field}"
    assert error["message"].startswith(f"controls[1].{field} ")


async def test_a_model_without_controls_refuses_them() -> None:
    controls = [{"name": "canny", "image": data_url(RED)}]
    response = await post(backend_with(), json={"prompt": "cat", "controls": controls})
    assert response.status_code == 400
    assert "controls must be left out" in response.json()["error"]["message"]
    response = await post(backend_with(), json={"prompt": "cat", "controlnet": "canny"})
    assert "controls" in response.json()["error"]["message"]
