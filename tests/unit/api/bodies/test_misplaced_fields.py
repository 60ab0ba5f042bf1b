"""What is sent in the wrong place, or in the wrong shape, is refused with what to do instead."""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend
from PIL import Image
from stepserve.api.bodies.fields import field_names
from stepserve.api.bodies.names import AS_EVER, ELSEWHERE, INSTEAD, OTHER_NAMES, hint
from stepserve.api.bodies.schemas import (
    EditRequest,
    ImageRequest,
    ImageRequestBase,
    UpscaleRequest,
    VariationRequest,
)
from stepserve.api.bodies.validation import EXAMPLES
from stepserve.api.images.inputs import FILES

BODIES: dict[str, type[ImageRequestBase]] = {
    "generations": ImageRequest,
    "edits": EditRequest,
    "variations": VariationRequest,
    "upscale": UpscaleRequest,
}


def drawn_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


FILE = drawn_image()
ADDRESS = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"
CONTROL = [{"name": "depth", "image": ADDRESS}]


@pytest.mark.parametrize(
    ("url", "sent", "param", "said"),
    [
        (
            "generations",
            {"control_image": ADDRESS},
            "control_image",
            "; in JSON the image stands in an entry of 'controls', in a form it is a file",
        ),
        ("generations", {"reference_images": [ADDRESS]}, "reference_images", "of 'references'"),
        ("generations", {"hires_scale": 2}, "hires_scale", "; did you mean 'hires'?"),
        ("generations", {"upscale_factor": 2}, "upscale_factor", "; did you mean 'hires'?"),
        ("generations", {"hires": {"factor": 2}}, "hires.factor", "; did you mean 'scale'?"),
        ("generations", {"noise_level": 1}, "noise_level", "; only /v1/images/upscale takes it"),
        (
            "generations",
            {"image_guidance_scale": 2},
            "image_guidance_scale",
            "; /v1/images/edits takes it",
        ),
        (
            "generations",
            {"init_image": ADDRESS},
            "init_image",
            "; did you mean 'image'? /v1/images/edits takes it",
        ),
        (
            "generations",
            {"controls": [{"name": "depth", "image": ADDRESS, "strength": 0.5}]},
            "controls[0].strength",
            "; did you mean 'scale'?",
        ),
        (
            "generations",
            {"controls": [{"control_image": ADDRESS}]},
            "controls[0].control_image",
            "; did you mean 'image'?",
        ),
        (
            "generations",
            {"references": [{"image": ADDRESS, "name": "style"}]},
            "references[0].name",
            "; did you mean 'adapter'?",
        ),
        (
            "generations",
            {"controls": [{"image": ADDRESS, "weight": 0.5}]},
            "controls[0].weight",
            "; did you mean 'scale'?",
        ),
        ("edits", {"image": ADDRESS, "hires": {}}, "hires", "; only /v1/images/generations take"),
        ("edits", {"image": ADDRESS, "class_label": 1}, "class_label", "; only /v1/images/gener"),
        ("edits", {"images": [{"file_id": "f"}]}, "images[0].file_id", "; no files are kept here"),
        ("edits", {"images": [{"url": ADDRESS}]}, "images[0].url", "; did you mean 'image_url'?"),
        ("variations", {"image": ADDRESS, "mask_image": ADDRESS}, "mask_image", "/v1/images/edits"),
        ("upscale", {"images": [ADDRESS]}, "images", "; one image is taken, in 'image'"),
        ("upscale", {"image": ADDRESS, "scale": 4}, "scale", "; every model has a factor of its"),
        ("upscale", {"image": ADDRESS, "upscale_factor": 4}, "upscale_factor", "; every model has"),
    ],
)
async def test_a_field_in_the_wrong_place_says_where_it_belongs(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    url: str,
    sent: dict[str, Any],
    param: str,
    said: str,
):
    response = await client.post(f"/v1/images/{url}", json={"prompt": "cat", **sent})

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"unknown field {param!r}; ")
    assert said in error["message"]
    assert not backend.requests


async def test_prompts_are_not_taken_for_prompt(client: httpx.AsyncClient):
    body = {"prompts": ["cat", "dog"], "image": ADDRESS}
    response = await client.post("/v1/images/edits", json=body)

    assert response.json()["error"]["param"] == "prompts"
    assert response.json()["error"]["message"] == (
        "unknown field 'prompts'; only /v1/images/generations takes it"
    )


@pytest.mark.parametrize(
    ("url", "file", "said"),
    [
        ("generations", "image", "; /v1/images/edits takes it (known: reference_image, contr"),
        ("generations", "init_image", "; did you mean 'image'? /v1/images/edits takes it"),
        ("generations", "control_images", "; did you mean 'control_image'?"),
        ("generations", "controls", "; send it as a text, not as a file"),
        ("variations", "mask", "; /v1/images/edits takes it"),
        ("upscale", "images", "; one image is taken, in 'image'"),
        ("edits", "unheard_of", " (known: image, images, mask, reference_image, control_image)"),
    ],
)
async def test_a_file_in_the_wrong_place_says_where_it_belongs(
    client: httpx.AsyncClient, backend: FakeBackend, url: str, file: str, said: str
):
    response = await client.post(
        f"/v1/images/{url}", data={"prompt": "cat"}, files={file: ("a.png", FILE)}
    )

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == file
    assert error["message"].startswith(f"unknown file {file!r}{said}")
    assert not backend.requests


@pytest.mark.parametrize("pair", list(itertools.permutations(BODIES.values(), 2)))
def test_no_field_of_another_url_is_set_aside(pair: tuple[type[ImageRequestBase], ...]):
    here, there = (body.model_fields for body in pair)
    told = {name: hint(name, here) for name in there if name not in here and name not in AS_EVER}

    assert all(told.values()), told


def test_urls_that_are_named_take_the_field():
    for name, told in ELSEWHERE.items():
        [url] = [word for word in told.split() if word.startswith("/")]
        assert name in BODIES[url.rpartition("/")[2]].model_fields


def test_the_tables_speak_of_fields_that_there_are():
    lists = ("controls", "references", "adapters", "images")
    paths = [(), *((name,) for name in (*lists, "hires", "step_cache"))]
    known = {name for body in BODIES.values() for path in paths for name in field_names(body, path)}

    assert set(OTHER_NAMES) <= known
    assert set(INSTEAD) <= known | {"control_image"}
    assert set(EXAMPLES) <= known


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            {"controls": "depth"},
            'controls must be a list such as [{"name": "depth", "image": '
            "\"data:image/png;base64,...\"}], got 'depth'",
        ),
        ({"controls": {"name": "depth"}}, "controls must be a list such as [{"),
        ({"controls": ["depth"]}, 'controls[0] must be an object such as {"name": "depth", "'),
        ({"controls": "[{}]"}, "got '[{}]'; that is a text: write it without quotes around it"),
        ({"images": ADDRESS}, 'images must be a list such as [{"image_url": "data:image/png;'),
        ({"image": [ADDRESS]}, "; several go into 'images'"),
        ({"prompt": ["cat"]}, "prompt must be a valid string, got ['cat']"),
    ],
)
async def test_a_wrong_shape_says_the_right_one(
    client: httpx.AsyncClient, backend: FakeBackend, sent: dict[str, Any], message: str
):
    response = await client.post("/v1/images/edits", json={"prompt": "cat", **sent})

    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert not backend.requests


@pytest.mark.parametrize("value", [2, True, "2", [2]])
async def test_hires_is_shown_as_an_object(client: httpx.AsyncClient, value: Any):
    response = await client.post("/v1/images/generations", json={"prompt": "c", "hires": value})

    assert response.json()["error"]["message"].startswith(
        'hires must be an object such as {"scale": 2}, got '
    )


async def test_a_list_of_prompts_goes_into_prompts(client: httpx.AsyncClient):
    response = await client.post("/v1/images/generations", json={"prompt": ["cat", "dog"]})

    assert response.json()["error"]["message"] == (
        "prompt must be a valid string, got ['cat', 'dog']; several go into 'prompts'"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[{'name': 'depth'}]",
            "; that is not valid JSON: Expecting property name enclosed in double quotes (at "
            "character 2)",
        ),
        ('[{"name": "depth"', "; that is not valid JSON: Expecting ',' delimiter"),
        ("depth", "got 'depth'"),
    ],
)
async def test_broken_json_in_a_form_is_called_so(client: httpx.AsyncClient, text: str, said: str):
    form = {"prompt": "cat", "controls": text}
    response = await client.post(
        "/v1/images/generations", data=form, files={"control_image": ("a.png", FILE)}
    )

    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert message.startswith("controls must be a list such as [{")
    assert said in message


async def test_a_form_that_is_declared_as_json_says_so(client: httpx.AsyncClient):
    response = await client.post(
        "/v1/images/edits",
        data={"prompt": "cat"},
        files={"image": ("a.png", FILE)},
        headers={"Content-Type": "application/json"},
    )
    error = response.json()["error"]

    assert (response.status_code, error["code"]) == (400, "invalid_json")
    assert "a form that is declared as JSON: leave out the header Content-Type" in error["message"]


async def test_a_form_does_not_number_the_entries_of_a_list(client: httpx.AsyncClient):
    form = {"prompt": "cat", "controls[0][name]": "depth"}
    response = await client.post("/v1/images/edits", data=form, files={"image": ("a.png", FILE)})
    error = response.json()["error"]

    assert error["param"] == "controls[0][name]"
    assert "a list or an object is " in error["message"]
    assert error["message"].endswith("as JSON")


async def test_a_control_without_an_image_is_named(client: httpx.AsyncClient):
    body = {"prompt": "cat", "controls": [*CONTROL, {"name": "edges"}]}
    response = await client.post("/v1/images/generations", json=body)
    error = response.json()["error"]

    assert error["param"] == "controls[1].image"
    assert error["message"] == "controls[1].image is required: send a 'data:' URL"


async def test_a_form_with_too_few_files_speaks_of_files(client: httpx.AsyncClient):
    form = {"prompt": "cat", "controls": '[{"name": "depth"}, {"name": "edges"}]'}
    response = await client.post(
        "/v1/images/generations", data=form, files={"control_image": ("a.png", FILE)}
    )
    error = response.json()["error"]

    assert error["param"] == "controls[1].image"
    assert error["message"] == (
        "controls[1].image is required: send a 'data:' URL, or a file control_image for each "
        "entry without one (got 1)"
    )


async def test_a_form_with_too_many_files_says_how_many_have_a_place(client: httpx.AsyncClient):
    form = {"prompt": "cat", "controls": '[{"name": "depth"}]'}
    files = [("control_image", ("a.png", FILE))] * 2
    response = await client.post("/v1/images/generations", data=form, files=files)
    error = response.json()["error"]

    assert error["param"] == "control_image"
    assert error["message"] == (
        "control_image must be one file for each entry of controls without an image, which 1 "
        "are; got 2"
    )


def test_every_file_of_a_form_is_known_to_a_body():
    assert set(FILES) <= set(EditRequest.model_fields)
