"""Forms whose fields are parts of one field, as OpenAI's clients send lists and objects."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from stepserve.api.bodies.forms import parse_fields
from stepserve.api.bodies.schemas import EditRequest, ImageRequestBase
from stepserve.domain.errors import InvalidRequestError

ADDRESS = "data:image/png;base64,1234"


def sent_by_openai(**fields: Any) -> dict[str, list[str]]:
    """The text fields of the form that the client makes of `extra_body`."""
    heard: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(request)
        return httpx.Response(200, json={"created": 1, "data": []})

    http: Any = httpx.Client(transport=httpx.MockTransport(answer))
    with openai.OpenAI(base_url="http://test/v1", api_key="unused", http_client=http) as ai:
        ai.images.edit(image=[b"a file", b"another"], prompt="cat", extra_body=fields)
    parts = heard[0].read().split(b"Content-Disposition: form-data; ")[1:]
    nested: dict[str, list[str]] = {}
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        name = head.split(b'"')[1].decode()
        if "[" in name and b"filename" not in head:
            nested.setdefault(name, []).append(content.split(b"\r\n--")[0].decode())
    return nested


def read(nested: dict[str, list[str]]) -> ImageRequestBase:
    return parse_fields({"prompt": "cat"}, EditRequest, nested)


def test_lists_and_objects_of_openais_client_are_read_as_their_json_is() -> None:
    fields: dict[str, Any] = {
        "controls": [
            {"name": "depth", "image": ADDRESS, "scale": 0.5},
            {"name": "7", "image": {"image_url": ADDRESS}, "scale": 1},
        ],
        "references": [{"image": ADDRESS}],
        "adapters": [{"name": "true", "scale": 2}, {"name": "b", "scale": 0}],
        "images": [{"image_url": ADDRESS}],
        "mask": {"image_url": ADDRESS},
    }
    nested = sent_by_openai(**fields)
    assert "controls[][name]" in nested
    # One entry writes its image in another way than the other, which a form cannot tell.
    with pytest.raises(InvalidRequestError, match="as JSON in one field"):
        read(nested)

    fields["controls"][1]["image"] = ADDRESS
    assert read(sent_by_openai(**fields)) == EditRequest.model_validate(fields | {"prompt": "cat"})


def test_entries_with_different_keys_are_refused() -> None:
    controls = [{"name": "depth", "scale": 0.5}, {"name": "canny"}]
    with pytest.raises(InvalidRequestError) as refused:
        read(sent_by_openai(controls=controls))

    assert refused.value.field == "controls"
    assert "'controls[][name]' 2 times, 'controls[][scale]' 1 times" in str(refused.value)


@pytest.mark.parametrize(
    "nested",
    [
        {"controls[]": ["{}"], "controls[][name]": ["a"]},
        {"controls[][name]": ["a"], "controls[name]": ["a"]},
        {"mask[image_url]": ["a", "b"]},
        {"mask[image_url]": ["a"], "mask[][image_url]": ["a"]},
        {"controls[][image]": ["a"], "controls[][image][image_url]": ["a"]},
    ],
)
def test_what_is_sent_in_two_ways_is_refused(nested: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidRequestError, match=r"twice|two ways|told apart"):
        read(nested)


def test_a_field_that_is_sent_whole_as_well_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'controls' is given twice"):
        parse_fields({"controls": "[]"}, EditRequest, {"controls[][name]": ["a"]})


def test_wrong_values_are_told_by_their_place() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read(sent_by_openai(adapters=[{"name": "a", "scale": 1}, {"name": "b", "scale": "much"}]))

    assert refused.value.field == "adapters[1].scale"


def test_parts_of_what_is_not_known_are_set_aside() -> None:
    assert read({"svg[a]": ["1", "2"], "metadata[a][]": ["1"]}).unknown_fields == (
        "svg[a]",
        "metadata[a][]",
    )
