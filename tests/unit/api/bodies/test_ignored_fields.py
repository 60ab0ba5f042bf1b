"""Fields that change nothing are named in the response; what is meant as one of ours is refused."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend, client_for
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stepserve.api.bodies.fields import MAX_UNKNOWN_FIELDS
from stepserve.api.bodies.names import AS_EVER, hint
from stepserve.api.bodies.schemas import EditRequest, ImageRequest
from stepserve.domain.model_status import ModelStatus
from usual_tasks import USUAL_TASKS

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"


def drawn_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def backend() -> FakeBackend:
    made = FakeBackend()
    tasks = USUAL_TASKS
    made.statuses = [ModelStatus(EMOJI.__class__(**{**vars(EMOJI), "tasks": tasks}), ready=True)]
    return made


async def generate(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(GENERATIONS, json={"prompt": "cat", **fields})


async def send_form(client: httpx.AsyncClient, url: str, **fields: str) -> httpx.Response:
    return await client.post(url, data={"prompt": "cat", **fields}, files={"image": drawn_image()})


async def test_what_was_used_is_not_named(client: httpx.AsyncClient):
    response = await generate(client, n=2, background="opaque", quality="auto", style=None)

    assert response.status_code == 200
    assert "ignored_fields" not in response.json()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("safety_identifier", "someone"),
        ("background", "transparent"),
        ("quality", "hd"),
        ("style", "vivid"),
        ("moderation", "low"),
        ("user", "someone"),
        ("input_fidelity", "high"),
        ("frame_count", 4),
        ("svg", {"model": "gpt-6"}),
        ("metadata", {"a": [1]}),
        ("timeout", 3),
        ("qualities", "hd"),
        ("providerOptions", None),
    ],
)
async def test_what_changes_nothing_is_named(client: httpx.AsyncClient, name: str, value: Any):
    response = await generate(client, **{name: value})

    assert response.status_code == 200, response.text
    assert response.json()["ignored_fields"] == [name]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"partial_images": 2}, ["partial_images"]),
        ({"partial_images": 0}, None),
        ({"previews": 2}, None),  # they can be followed under `/events`
        ({"guidance_scale": 1, "guidance_start": 0.2}, ["guidance_start"]),
        (
            {"guidance_scale": 0, "guidance_start": 0.2, "guidance_end": 0.8},
            ["guidance_start", "guidance_end"],
        ),
        ({"guidance_scale": 1, "guidance_start": 0, "guidance_end": 1.0}, None),
        ({"guidance_scale": 3, "guidance_start": 0.2, "guidance_end": 0.8}, None),
        ({"guidance_start": 0.2}, None),
    ],
)
async def test_what_changes_nothing_beside_the_other_fields_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], named: list[str] | None
):
    response = await generate(client, **fields)

    assert response.status_code == 200, response.text
    assert response.json().get("ignored_fields") == named


async def test_previews_take_the_place_of_partial_images(client: httpx.AsyncClient):
    response = await generate(client, stream=True, partial_images=1, previews=2)
    last = [line for line in response.text.splitlines() if line.startswith("data: ")][-1]

    assert json.loads(last[6:])["ignored_fields"] == ["partial_images"]


async def test_names_inside_of_fields(client: httpx.AsyncClient):
    adapters = [{"name": "ink"}, {"name": "pixels", "colour": 1}]
    response = await generate(client, adapters=adapters, unheard_of=1)

    assert response.json()["ignored_fields"] == ["unheard_of", "adapters[1].colour"]


@pytest.mark.parametrize("url", [EDITS, VARIATIONS])
async def test_forms(client: httpx.AsyncClient, url: str):
    response = await send_form(
        client, url, **{"background": "transparent", "unheard_of": "1", "svg[model]": "x"}
    )

    assert response.status_code == 200, response.text
    assert response.json()["ignored_fields"] == ["background", "unheard_of", "svg[model]"]


async def test_json_with_addresses(client: httpx.AsyncClient, backend: FakeBackend):
    address = f"data:image/png;base64,{base64.b64encode(drawn_image()).decode()}"
    body = {"prompt": "cat", "images": [{"image_url": address, "detail": "high"}]}
    response = await client.post(EDITS, json=body)

    assert response.status_code == 200, response.text
    assert response.json()["ignored_fields"] == ["images[0].detail"]


async def test_streams_name_them_in_the_end(client: httpx.AsyncClient):
    response = await generate(
        client, stream=True, partial_images=1, background="transparent", unheard_of=1
    )
    told = [
        json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")
    ]

    assert [event.get("ignored_fields") for event in told] == [None, ["background", "unheard_of"]]
    assert {(event["background"], event["quality"]) for event in told} == {("opaque", "auto")}


async def test_query_parameters(client: httpx.AsyncClient):
    response = await client.post(
        f"{GENERATIONS}?api-version=2&unheard_of=1", json={"prompt": "cat"}
    )

    assert response.json()["ignored_fields"] == ["api-version", "unheard_of"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("n=2", "unknown query parameter 'n'; send it in the body"),
        ("sede=2", "unknown query parameter 'sede'; did you mean 'seed'?"),
        ("%00=2", "unknown query parameter '\\x00'"),
    ],
)
async def test_query_parameters_that_are_meant_as_fields(
    client: httpx.AsyncClient, backend: FakeBackend, query: str, message: str
):
    response = await client.post(f"{GENERATIONS}?{query}", json={"prompt": "cat"})

    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert not backend.requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sede": 1}, "unknown field 'sede'; did you mean 'seed'?"),
        ({"negativePrompt": "a"}, "did you mean 'negative_prompt'?"),
        ({"width": 512}, "unknown field 'width'; did you mean 'size'?"),
        ({"Steps": 4}, "did you mean 'num_inference_steps'?"),
        ({"image": "data:,"}, "unknown field 'image'; /v1/images/edits takes it"),
        ({"adapters": [{"name": "a", "Scale": 2}]}, "'adapters[0].Scale'; did you mean 'scale'?"),
        ({"": 1}, "unknown field ''"),
        ({"__proto__": 1}, "unknown field '__proto__'"),
        ({"k" * 65: 1}, "unknown field"),
        ({f"k{i}": 1 for i in range(MAX_UNKNOWN_FIELDS + 1)}, "unknown field 'k0'"),
        ({"unheard_of": 1, "sede": 1, "n": "a"}, "n must be a valid integer, got 'a'; unknown"),
    ],
)
async def test_what_is_meant_as_a_field_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], message: str
):
    response = await generate(client, **fields)

    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "unheard_of" not in response.json()["error"]["message"]
    assert not backend.requests


async def test_a_form_with_what_is_inside_a_field_is_refused(client: httpx.AsyncClient):
    response = await send_form(client, EDITS, **{"adapters[0][name]": "ink"})

    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "unknown field 'adapters[0][name]'; in a form, 'adapters' is one field: a list or an "
        "object is written there as JSON"
    )


@given(st.sampled_from(sorted(EditRequest.model_fields)), st.data())
def test_a_letter_too_few_or_too_many_is_noticed(field: str, data: st.DataObject):
    if len(field) < 4 or field in AS_EVER:
        return
    place = data.draw(st.integers(0, len(field) - 1))
    assert hint(field[:place] + field[place + 1 :], EditRequest.model_fields)
    assert hint(field[:place] + "x" + field[place:], EditRequest.model_fields)


WHOLE = ["n", "num_inference_steps", "seed", "previews", "partial_images"]


@pytest.mark.parametrize("name", WHOLE)
async def test_whole_numbers_may_be_written_with_a_point(
    client: httpx.AsyncClient, backend: FakeBackend, name: str
):
    text = f'{{"prompt": "cat", "stream": true, "{name}": 2.0}}'
    response = await client.post(GENERATIONS, content=text, headers={"content-type": JSON_TYPE})
    form = await send_form(client, EDITS, **{name: "2.0", "stream": "true"})

    assert (response.status_code, form.status_code) == (200, 200), form.text
    given, of_form = backend.requests
    attribute = "previews" if name == "partial_images" else name
    assert (getattr(given, attribute), getattr(of_form, attribute)) == (2, 2)
    assert type(getattr(given, attribute)) is int


JSON_TYPE = "application/json"


@pytest.mark.parametrize("value", ["1.5", "1e309", "NaN", '"1.0"', "true", "-1.0", "1e300"])
@pytest.mark.parametrize("name", [*WHOLE, "output_compression"])
async def test_other_numbers_are_not_whole(client: httpx.AsyncClient, name: str, value: str):
    text = f'{{"prompt": "cat", "output_format": "webp", "{name}": {value}}}'
    response = await client.post(GENERATIONS, content=text, headers={"content-type": JSON_TYPE})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_every_whole_number_of_the_schema_takes_a_point():
    schema = ImageRequest.model_json_schema()["properties"]
    kinds = {
        name: [kind.get("type") for kind in field.get("anyOf", [field])]
        for name, field in schema.items()
    }
    whole = sorted(name for name, kind in kinds.items() if "integer" in kind)

    assert whole == sorted([*WHOLE, "output_compression", "class_label"])


async def test_images_on_the_way_of_a_model_that_makes_none_are_told():
    backend = FakeBackend()
    backend.statuses = [ModelStatus(replace(EMOJI, previews=False), ready=True)]
    client = client_for(backend)
    model = (await client.get("/v1/models/emoji")).json()
    body = {"prompt": "cat", "stream": True, "partial_images": 2, "previews": 3}
    response = await client.post("/v1/images/generations", json=body)

    assert model["previews"] is False
    assert '"ignored_fields":["partial_images","previews"]' in response.text.replace(" ", "")
