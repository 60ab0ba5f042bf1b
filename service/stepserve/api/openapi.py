"""Descriptions and examples of errors in the OpenAPI document, read from the error table."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from stepserve.api.errors import TABLE
from stepserve.api.images.responses import ErrorResponse
from stepserve.domain.errors import RefusedError, StepserveError, UnmeetableDeadlineError

Responses = dict[int | str, dict[str, Any]]

REQUEST_ID = {
    "X-Request-ID": {
        "description": "Given by the client (1 to 128 of A-Z a-z 0-9 . _ -) or made.",
        "schema": {"type": "string"},
    }
}
SERVER_TIMING = {
    "Server-Timing": {
        "description": "Milliseconds in queue, encode, denoise, decode and total; the share of "
        "its forwards' rows; how many of its denoiser calls ran.",
        "schema": {"type": "string"},
    }
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "Whole seconds after which a new try is likely to succeed.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
REQUEST_ID_PARAMETER = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "description": "Names this request in logs and in the response; made where it does not fit.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}


def error_responses(*classes: type[StepserveError]) -> Responses:
    """Return the OpenAPI responses of a route that may answer with these errors.

    The "default" entry stands for all others (and keeps FastAPI from promising a 422).
    """
    responses: Responses = {"default": {"model": ErrorResponse, "description": "Any other error."}}
    for error_class in classes:
        _add(responses, error_class)
    return responses


def _add(responses: Responses, error_class: type[StepserveError]) -> None:
    kind = TABLE[error_class]
    text = (error_class.__doc__ or "").splitlines()[0]
    is_refusal = issubclass(error_class, RefusedError)
    response = responses.setdefault(
        kind.status,
        {
            "model": ErrorResponse,
            "description": text,
            "headers": REQUEST_ID | (RETRY_AFTER if is_refusal else {}),
            "content": {"application/json": {"examples": {}}},
        },
    )
    example: dict[str, Any] = {
        "message": text,
        "type": kind.type,
        "param": None,
        "code": kind.code,
    }
    if issubclass(error_class, UnmeetableDeadlineError):
        example |= {"param": error_class.field, "expected_s": 3.4}
    response["content"]["application/json"]["examples"][kind.code] = {"value": {"error": example}}


def event_stream(text: str, *names: str) -> dict[str, Any]:
    """Return the content of a response that is a stream of server-sent events of these names."""
    properties = {
        "event": {"type": "string", "enum": [*names]},
        "data": {"type": "string", "contentMediaType": "application/json", "description": text},
        "id": {"type": "string"},
    }
    schema = {"type": "object", "properties": properties, "required": ["event", "data"]}
    return {"text/event-stream": {"schema": schema}}


def add_schemas(app: FastAPI, *models: type[BaseModel]) -> None:
    """Describe `models` in the document of `app`: FastAPI sees none that we read ourselves."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            inner = schema.pop("$defs", {})
            for name, definition in (inner | {model.__name__: schema}).items():
                document["components"]["schemas"].setdefault(name, definition)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def form_or_json(model: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    """Return a request body that is a form whose `files` are files, or JSON with their URLs."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    file = {"type": "string", "format": "binary"}
    form = dict(schema["properties"])
    form |= {name: file | {"description": form[name]["description"]} for name in files}
    if "images" in form:
        several = {"type": "array", "items": file}
        form["images"] = several | {"description": form["images"]["description"]}
    for name, placed in (("references", "reference_image"), ("controls", "control_image")):
        if name in form:
            several = {"type": "array", "items": file}
            form[placed] = several | {"description": f"The images of `{name}`, in order."}
    form_schema = schema | {"properties": form}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form_schema | {"title": f"{model.__name__}Form"}},
            "application/json": {"schema": schema},
        },
    }
