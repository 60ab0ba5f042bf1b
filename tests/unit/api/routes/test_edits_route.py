"""Edits and variations: forms and JSON, real images, and what becomes of them."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from api_fakes import EMOJI, FakeBackend, client_for
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stepserve.api.images import inputs
from stepserve.api.images.sizes import nearest_size
from stepserve.config import Settings, UploadSettings
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import Failed
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import SizeRange
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import ONE, OPTIONAL, Role, Task
from usual_tasks import USUAL_TASKS

EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
SETTINGS = Settings(uploads=UploadSettings(max_bytes=50_000, max_pixels=40_000))


def drawn_image(
    size: tuple[int, int] = (64, 48), mode: str = "RGB", kind: str = "PNG", **options: Any
):
    buffer = io.BytesIO()
    Image.new(mode, size, options.pop("color", "red")).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(file: bytes | None) -> Image.Image:
    assert file is not None
    return Image.open(io.BytesIO(file))


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    tasks = USUAL_TASKS
    capabilities = EMOJI.__class__(**{**vars(EMOJI), "tasks": tasks})
    backend.statuses = [ModelStatus(capabilities, ready=True)]
    return backend


@pytest.fixture
def client(backend: FakeBackend) -> httpx.AsyncClient:
    return client_for(backend, SETTINGS)


async def test_an_edit_without_mask_is_image_to_image(
    client: httpx.AsyncClient, backend: FakeBackend
):
    fields = {"prompt": "blue", "strength": "0.5", "n": "2", "seed": "7", "quality": "high"}
    response = await client.post(EDITS, data=fields, files={"image": drawn_image()})

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert (request.task, request.strength, request.n, request.seed) == (
        Task.IMAGE_TO_IMAGE,
        0.5,
        2,
        7,
    )
    assert (request.width, request.height) == (64, 48)
    assert response.json()["parameters"]["strength"] == 0.5
    assert len(response.json()["data"]) == 2


@pytest.mark.parametrize(
    "mask",
    [
        # OpenAI's: transparent is repainted. diffusers': white is.
        drawn_image(mode="RGBA", color=(0, 0, 0, 0)),
        drawn_image(mode="L", color=255),
        drawn_image(mode="RGBA", color=(255, 255, 255, 255)),
    ],
)
async def test_an_edit_with_mask_is_inpainting(
    client: httpx.AsyncClient, backend: FakeBackend, mask: bytes
):
    files = {"image": drawn_image(), "mask": mask}
    response = await client.post(EDITS, data={"prompt": "blue"}, files=files)

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.INPAINTING
    assert (request.images, request.mask) == ((drawn_image(),), mask)


@pytest.mark.parametrize("name", ["image", "image[]", "images"])
async def test_names_of_the_image(client: httpx.AsyncClient, backend: FakeBackend, name: str):
    await client.post(EDITS, data={"prompt": "blue"}, files={name: drawn_image()})

    assert len(backend.requests) == 1


async def test_json_with_a_data_url(client: httpx.AsyncClient, backend: FakeBackend):
    url = f"data:image/png;base64,{base64.b64encode(drawn_image()).decode()}"
    bodies = [
        {"prompt": "blue", "image": url, "mask": url},
        {"prompt": "blue", "images": [{"image_url": url}], "mask": {"image_url": url}},
    ]
    responses = [await client.post(EDITS, json=body) for body in bodies]

    assert [response.status_code for response in responses] == [200, 200]
    assert {request.task for request in backend.requests} == {Task.INPAINTING}


A_MASK = '{"image_url": "data:image/png;base64,..."}'


@pytest.mark.parametrize(
    ("mask", "field", "message"),
    [
        (5, "mask", f"mask must be an object such as {A_MASK}, got 5"),
        (["x"], "mask", f"mask must be an object such as {A_MASK}, got ['x']"),
        ({}, "mask.image_url", "mask.image_url is required"),
        ({"image_url": 5}, "mask.image_url", "mask.image_url must be a valid string, got 5"),
    ],
)
async def test_what_is_wrong_with_a_mask_is_said_in_the_callers_words(
    client: httpx.AsyncClient, mask: object, field: str, message: str
):
    image = base64.b64encode(drawn_image()).decode()
    response = await client.post(EDITS, json={"prompt": "blue", "image": image, "mask": mask})

    assert response.status_code == 400
    told = response.json()["error"]
    assert (told["param"], told["message"]) == (field, message)


@pytest.mark.parametrize("item", ["pixels", 5, None])
async def test_an_adapter_without_braces_is_told_to_be_an_object(
    client: httpx.AsyncClient, item: object
):
    response = await client.post("/v1/images/generations", json={"prompt": "x", "adapters": [item]})

    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(
        'adapters[0] must be an object such as {"name": "ink", "scale": 0.8}, got '
    )


async def test_a_variation_needs_no_prompt(client: httpx.AsyncClient, backend: FakeBackend):
    response = await client.post(VARIATIONS, data={"n": "1"}, files={"image": drawn_image()})

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert (request.task, request.prompt, request.n) == (Task.IMAGE_TO_IMAGE, "", 1)


async def test_an_edit_needs_no_prompt_where_it_is_optional(
    client: httpx.AsyncClient, backend: FakeBackend
):
    response = await client.post(EDITS, data={"n": "1"}, files={"image": drawn_image()})

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert (request.task, request.prompt) == (Task.IMAGE_TO_IMAGE, "")


@pytest.mark.parametrize(
    ("fields", "used"),
    [({}, 1.5), ({"image_guidance_scale": "2"}, 2.0), ({"guidance_scale": "1"}, None)],
)
async def test_the_usual_image_guidance_is_told_where_there_is_guidance(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, str], used: float | None
):
    edits = {Task.EDIT: {Role.PROMPT: ONE, Role.IMAGE: ONE, Role.IMAGE_GUIDANCE: OPTIONAL}}
    model = replace(EMOJI, tasks=edits, default_image_guidance_scale=1.5)
    backend.statuses = [ModelStatus(model, ready=True)]
    form = {"prompt": "blue", **fields}
    response = await client.post(EDITS, data=form, files={"image": drawn_image()})

    assert response.status_code == 200, response.text
    assert response.json()["parameters"].get("image_guidance_scale") == used
    assert backend.requests[0].image_guidance_scale == used


async def test_an_edit_needs_a_prompt_where_it_is_required(
    client: httpx.AsyncClient, backend: FakeBackend
):
    edits = {Task.EDIT: {Role.PROMPT: ONE, Role.IMAGE: ONE}}
    backend.statuses = [ModelStatus(replace(EMOJI, tasks=edits), ready=True)]
    response = await client.post(EDITS, data={"n": "1"}, files={"image": drawn_image()})

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert error["message"].startswith("prompt is empty: edit with model 'emoji' requires one")


async def test_streamed_edits_have_names_of_their_own(client: httpx.AsyncClient):
    fields = {"prompt": "blue", "stream": "true", "partial_images": "1"}
    response = await client.post(EDITS, data=fields, files={"image": drawn_image()})

    assert "event: image_edit.partial_image" in response.text
    assert "event: image_edit.completed" in response.text


async def test_images_lose_all_but_their_pixels_and_how_to_turn_them(
    client: httpx.AsyncClient, backend: FakeBackend
):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010F] = "Camera maker"
    file = drawn_image((64, 48), kind="JPEG", exif=exif)
    await client.post(EDITS, data={"prompt": "blue"}, files={"image": file})

    request = backend.requests[0]
    assert (request.width, request.height) == (48, 64)
    assert dict(opened(request.images[0]).getexif()) == {0x0112: 6}
    assert b"Camera" in file
    assert b"Camera" not in backend.requests[0].images[0]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
WRONG: list[tuple[dict[str, str], dict[str, bytes], str, str]] = [
    ({"prompt": "x"}, {"mask": drawn_image()}, "image", "is required"),
    ({"prompt": "x"}, {"image": SVG}, "image", "cannot be read as an image"),
    ({"prompt": "x"}, {"image": drawn_image()[:60]}, "image", "cannot be read as an image"),
    ({"prompt": "x"}, {"image": drawn_image(kind="GIF")}, "image", "known: PNG, JPEG, WEBP"),
    (
        {"prompt": "x"},
        {"image": drawn_image((201, 200))},
        "image",
        "201x200 pixels; the limit is 40000",
    ),
    ({"prompt": "x"}, {"image": b"\0" * 50_001}, "image", "50001 bytes long; the limit is 50000"),
    (
        {"prompt": "x"},
        {"image": drawn_image(), "mask": drawn_image((8, 8))},
        "mask",
        "must be equal",
    ),
    ({"prompt": "x"}, {"image": drawn_image(), "msk": drawn_image()}, "msk", "unknown file"),
    ({"prompt": "x", "strength": "2"}, {"image": drawn_image()}, "strength", "at most 1, got 2"),
    ({"prompt": "x", "strength": "much"}, {"image": drawn_image()}, "strength", "valid number"),
    ({"prompt": "x", "stepz": "2"}, {"image": drawn_image()}, "stepz", "unknown field"),
    ({"prompt": "x", "image": "http://10.0.0.1/"}, {}, "image", "fetches no addresses"),
    ({"prompt": "x", "image": "data:text/html;base64,aaaa"}, {}, "image", "cannot be read"),
    ({"prompt": "x", "image": "data:image/png"}, {}, "image", "must be written as"),
    ({"prompt": "x", "image": "data:image/png;base64,%%"}, {}, "image", "wrong base64"),
]


@pytest.mark.parametrize(("fields", "files", "param", "message"), WRONG)
async def test_mistakes_are_named(
    client: httpx.AsyncClient,
    fields: dict[str, str],
    files: dict[str, bytes],
    param: str,
    message: str,
):
    parts = files or {"unused[]": b""}
    response = await client.post(EDITS, data=fields, files=parts if files else None)
    if not files:
        response = await client.post(EDITS, json=fields)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert message in response.json()["error"]["message"]


async def test_two_images_are_one_too_many(client: httpx.AsyncClient):
    files = [("image[]", drawn_image()), ("image[]", drawn_image())]
    response = await client.post(EDITS, data={"prompt": "x"}, files=files)

    message = response.json()["error"]["message"]
    assert message.startswith("image must be 1 for image-to-image with model 'emoji', got 2")


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("text/plain", b"x", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense", 400),
    ],
)
async def test_bodies_of_other_kinds(
    client: httpx.AsyncClient, content_type: str, body: bytes, status: int
):
    response = await client.post(EDITS, content=body, headers={"Content-Type": content_type})

    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("charset", "part"),
    [
        ("undefined", b'name="prompt"'),
        ("punycode", b'name="prompt"'),
        ("utf-7", b'name="+2AA-"'),
        ("utf-7", b'name="+2AA-"; filename="f"'),
        ("unicode_escape", rb'name="\\ud800"'),
        ("unicode_escape", rb'name="\\ud800"; filename="f"'),
    ],
)
async def test_texts_that_are_none_in_their_charset(
    client: httpx.AsyncClient, charset: str, part: bytes
):
    prompt = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nblue\r\n'
    other = b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n\r\n\\ud800\r\n--x--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    response = await client.post(EDITS, content=prompt + other, headers=headers)

    assert response.status_code == 400
    assert "charset" in response.json()["error"]["message"]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_size_is_one_that_the_model_has(width: int, height: int):
    sizes = SizeRange(minimum=48, maximum=128, step=16, native=64)
    found = nearest_size(width, height, sizes)

    assert all(map(sizes.accepts, found))
    if sizes.accepts(width) and sizes.accepts(height):
        assert found == (width, height)
    assert (found[0] >= found[1]) == (width >= height) or found[0] == found[1]


@pytest.mark.parametrize(
    ("image", "size"),
    [((100, 80), (80, 64)), ((80, 100), (64, 80)), ((150, 100), (96, 64)), ((97, 97), (64, 64))],
)
def test_the_nearest_size_has_the_shape_of_the_image(image: tuple[int, int], size: tuple[int, int]):
    sizes = SizeRange(minimum=48, maximum=128, step=16, native=64)

    assert nearest_size(*image, sizes) == size


@pytest.mark.parametrize("stream", ["false", "true"])
async def test_what_decoding_finds_wrong_is_told_as_what_the_header_says(
    client: httpx.AsyncClient, backend: FakeBackend, stream: str
):
    error = InvalidRequestError("mask marks nothing to repaint", "mask")

    async def refuse(request: GenerationRequest) -> Failed:
        return Failed(request.id, error)

    backend.generate_with(refuse)
    fields = {"prompt": "blue", "stream": stream}
    response = await client.post(
        EDITS, data=fields, files={"image": drawn_image(), "mask": drawn_image()}
    )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "mask"
    assert "marks nothing to repaint" in response.json()["error"]["message"]


async def test_what_a_browser_sends_of_what_nobody_filled_in_counts_as_absent(
    client: httpx.AsyncClient, backend: FakeBackend
):
    texts = ("seed", "size", "n", "strength", "negative_prompt", "quality", "stream")
    fields = "".join(part(f'name="{name}"', b"") for name in texts)
    unchosen = "".join(
        part(f'name="{name}"; filename=""\r\nContent-Type: application/octet-stream', b"")
        for name in ("mask", "image[]", "other")
    )
    chosen = part('name="image"; filename="a.png"', drawn_image())
    body = fields + unchosen + part('name="prompt"', b"blue") + chosen + "--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = await client.post(EDITS, content=body.encode("latin-1"), headers=headers)

    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.task is Task.IMAGE_TO_IMAGE
    assert "ignored_fields" not in response.json()


async def test_a_file_that_was_chosen_and_is_empty_is_told(client: httpx.AsyncClient):
    response = await client.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", b"")})

    assert response.status_code == 400
    assert "image of 0 bytes cannot be read" in response.json()["error"]["message"]


def part(disposition: str, content: bytes) -> str:
    head = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head + content.decode("latin-1") + "\r\n"


PNG = base64.b64encode(drawn_image()).decode()


@pytest.mark.parametrize(
    "address",
    [
        f"data:image/PNG;base64,{PNG}",
        f"data:image/png;name=x.png;base64,{PNG}",
        f"data:image/png;charset=utf-8;BASE64,{PNG}",
        f"Data:image/png;base64,{PNG}",
        f"data:;base64,{PNG}",
        f"data:application/octet-stream;base64,{PNG}",
        f"  data:image/png;base64, {PNG}\n",
        "data:image/png;base64," + "\r\n".join(PNG[i : i + 76] for i in range(0, len(PNG), 76)),
        f"data:image/png;base64,{quote(PNG, safe='')}",
        "data:image/png;base64," + PNG.replace("+", "-").replace("/", "_").rstrip("="),
        f"data:image/png,{quote(drawn_image())}",
        PNG,
        PNG.rstrip("="),
    ],
)
async def test_images_as_text_however_they_are_written(
    client: httpx.AsyncClient, backend: FakeBackend, address: str
):
    bodies = [
        {"prompt": "x", "image": address, "mask": address},
        {"prompt": "x", "images": [{"image_url": address}], "mask": {"image_url": address}},
    ]
    for body in bodies:
        response = await client.post(EDITS, json=body)
        assert response.status_code == 200, response.text
        request = backend.requests[-1]
        assert request.images == (request.mask,) == (drawn_image(),)


@pytest.mark.parametrize("field", ["image", "mask"])
async def test_addresses_are_counted_before_any_is_fetched(
    field: str, monkeypatch: pytest.MonkeyPatch
):
    fetched: list[str] = []

    async def fetch(address: str, field: str, limits: UploadSettings) -> bytes:
        fetched.append(address)
        return drawn_image()

    monkeypatch.setattr(inputs, "fetch_image", fetch)
    settings = Settings(uploads=UploadSettings(urls=True))
    urls = [{"image_url": f"https://example.com/{i}"} for i in range(300)]
    body: dict[str, Any] = {"prompt": "x", "images": urls}
    if field == "mask":
        body = {"prompt": "x", "image": "https://example.com/", "images": urls[:1]}
        body |= {"mask": urls[0]}
    response = await client_for(FakeBackend(), settings).post(EDITS, json=body)

    told = "images must have at most 64 entries, got 300"
    if field == "mask":
        told = "image must be 1 for inpainting with model 'emoji', got 2"
    assert response.json()["error"]["message"].startswith(told)
    assert fetched == []


async def test_long_lists_are_counted_before_their_entries_are_looked_at(
    client: httpx.AsyncClient,
):
    for field in ("images", "adapters"):
        response = await client.post(EDITS, json={"prompt": "x", "image": PNG, field: [1] * 900})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        told = f"{field} must have at most 64 entries, got 900"
        assert response.json()["error"]["message"] == told


@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin"])
async def test_a_form_that_a_page_from_elsewhere_sends_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, site: str
):
    # Browsers send forms to any server, without asking it first.
    headers = {"Sec-Fetch-Site": site, "Origin": "https://other.example"}
    files = {"image": drawn_image()}

    response = await client.post(EDITS, data={"prompt": "x"}, files=files, headers=headers)

    assert len(backend.requests) == (site == "same-origin")
    assert response.status_code == (200 if site == "same-origin" else 403)
