"""Whatever is sent, no response is a 5xx, and every response is as the OpenAPI document says."""

from __future__ import annotations

from typing import Any

import schemathesis
from api_fakes import EMOJI, FakeBackend, make_app
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from stepserve.config import Settings
from stepserve.domain.model_status import ModelStatus
from usual_tasks import USUAL_TASKS

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def fuzzed_app():
    backend = FakeBackend()
    tasks = USUAL_TASKS
    backend.statuses = [ModelStatus(EMOJI.__class__(**{**vars(EMOJI), "tasks": tasks}), ready=True)]
    return make_app(backend, Settings())


def with_single_files(node: Any) -> Any:
    """The document with one file where a form takes several.

    Schemathesis checks what it made of lists of files with a validator that cannot read them.
    """
    if isinstance(node, dict):
        items = node.get("items")
        if isinstance(items, dict) and items.get("format") == "binary":
            return {key: value for key, value in node.items() if key != "items"} | items
        return {key: with_single_files(value) for key, value in node.items()}
    return [with_single_files(value) for value in node] if isinstance(node, list) else node


app = fuzzed_app()
schema = schemathesis.openapi.from_dict(with_single_files(app.openapi()))
schema.app = app


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_documented(case: schemathesis.Case):
    case.call_and_validate(checks=CHECKS)
