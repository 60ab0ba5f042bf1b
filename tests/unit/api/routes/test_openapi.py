from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_fakes import FakeBackend, make_app
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from stepserve.api.bodies.schemas import ImageRequest
from stepserve.api.images.responses import ErrorResponse, ImagesResponse


@pytest.fixture
def document() -> dict[str, Any]:
    return make_app(FakeBackend()).openapi()


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_all_routes_are_there(document: dict[str, Any]):
    assert {path: set(methods) for path, methods in document["paths"].items()} == {
        "/v1/images/generations": {"post"},
        "/v1/images/edits": {"post"},
        "/v1/images/variations": {"post"},
        "/v1/images/upscale": {"post"},
        "/v1/requests/{id}": {"get", "delete"},
        "/v1/requests/{id}/events": {"get"},
        "/v1/results/{name}": {"get"},
        "/v1/models": {"get"},
        "/v1/models/{id}": {"get"},
        "/v1/models/{id}/batch": {"get"},
        "/healthz": {"get"},
        "/readyz": {"get"},
    }


def test_references_lead_somewhere(document: dict[str, Any]):
    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}

    assert names
    assert names <= set(document["components"]["schemas"])


def test_schemas_are_valid(document: dict[str, Any]):
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_operations_are_described_and_unique(document: dict[str, Any]):
    ids = [operation["operationId"] for operation in operations(document)]

    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] for operation in operations(document))
    assert all(operation["description"] for operation in operations(document))


def test_errors_are_described_and_none_is_fastapis(document: dict[str, Any]):
    post = document["paths"]["/v1/images/generations"]["post"]

    expected = {"200", "400", "404", "409", "413", "415", "429", "500", "503", "504", "default"}
    assert set(post["responses"]) == expected
    refusals = post["responses"]["429"]
    assert "Retry-After" in refusals["headers"]
    example = refusals["content"]["application/json"]["examples"]["deadline_unmeetable"]
    assert example["value"]["error"]["expected_s"] > 0
    assert "Server-Timing" in post["responses"]["200"]["headers"]
    assert not any("HTTPValidationError" in reference for reference in references(document))


def test_error_examples_have_the_shape_of_errors(document: dict[str, Any]):
    seen = 0
    for operation in operations(document):
        for status, response in operation["responses"].items():
            if status == "200":
                continue
            content = response["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
            for example in content.get("examples", {}).values():
                ErrorResponse.model_validate(example["value"])
                seen += 1
    assert seen >= 10


def test_request_fields_are_described_and_examples_are_valid(document: dict[str, Any]):
    schema = document["components"]["schemas"]["ImageRequest"]

    assert all(field["description"] for field in schema["properties"].values())
    assert "required" not in schema
    assert schema["additionalProperties"] is True
    for example in schema["examples"]:
        ImageRequest.model_validate(example)


def test_answer_example_is_valid_and_complete(document: dict[str, Any]):
    schema = document["components"]["schemas"]["ImagesResponse"]

    for example in schema["examples"]:
        assert ImagesResponse.model_validate(example).model_dump(exclude_none=True) == example
        ImageRequest.model_validate(example["parameters"])


async def test_answers_fit_their_schema(client: httpx.AsyncClient, document: dict[str, Any]):
    response = await client.post("/v1/images/generations", json={"prompt": "cat", "n": 2})
    models = await client.get("/v1/models")

    for name, body in (("ImagesResponse", response.json()), ("ModelList", models.json())):
        root = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator(root).validate(body)


async def test_docs_page(client: httpx.AsyncClient):
    page = await client.get("/docs")

    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert (await client.get("/openapi.json")).status_code == 200


def test_the_document_is_valid_and_names_its_operations(document: dict[str, Any]):
    validate(document)

    names = {operation["operationId"] for operation in operations(document)}
    assert {"create_images", "edit_image", "vary_image", "show_request", "list_models"} <= names


def test_tags_and_server_are_described(document: dict[str, Any]):
    described = {tag["name"]: tag["description"] for tag in document["tags"]}
    used = {tag for operation in operations(document) for tag in operation["tags"]}

    assert used == set(described)
    assert all(described.values())
    assert [server["url"] for server in document["servers"]] == ["/"]


def test_operation_ids_are_those_that_generated_clients_were_made_of(document: dict[str, Any]):
    assert {operation["operationId"] for operation in operations(document)} == {
        "create_images",
        "edit_image",
        "vary_image",
        "upscale_image",
        "show_request",
        "cancel_request",
        "follow_request",
        "fetch_result",
        "list_models",
        "show_model",
        "show_batch",
        "healthz",
        "readyz",
    }


async def test_the_docs_page_allows_no_script_but_its_own(client: httpx.AsyncClient):
    page = await client.get("/docs")
    policy = page.headers["content-security-policy"]
    [inline] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = b64encode(hashlib.sha256(inline.encode()).digest()).decode()

    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert "default-src 'self';" in policy
    assert "unsafe-eval" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_the_docs_page_needs_no_other_host(client: httpx.AsyncClient):
    page = (await client.get("/docs")).text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    found = [await client.get(address) for address in addresses]

    assert "swagger-ui-bundle.js" in page
    assert len(addresses) >= 3
    assert all(address.startswith("/docs/assets/") for address in addresses)
    assert [response.status_code for response in found] == [200] * len(found)
