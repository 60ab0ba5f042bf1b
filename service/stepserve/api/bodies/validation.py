"""From what FastAPI and pydantic say about a wrong body to messages for the caller."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from stepserve.api.bodies.fields import field_names, hint
from stepserve.api.errors import MalformedJsonError
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

MAX_PROBLEMS = 5

_brief = Repr()
_brief.maxstring = 80


def invalid_request(error: RequestValidationError, body: type[BaseModel]) -> InvalidRequestError:
    """Return one error that tells every problem of the body (the first few, if very many).

    Args:
        error: as raised by FastAPI.
        body: what it was checked as; its fields are what an unknown one may be meant as.
    """
    problems = list(error.errors())
    first = problems[0]
    if first["type"] == "json_invalid":
        reason, position = first["ctx"]["error"], first["loc"][-1]
        return MalformedJsonError(f"the body is not valid JSON: {reason} (at character {position})")
    messages = [_explain(problem, body) for problem in problems[:MAX_PROBLEMS]]
    return InvalidRequestError("; ".join(messages), _param(first))


def _explain(problem: dict[str, Any], body: type[BaseModel]) -> str:
    field = _field(problem)
    if field is None:
        return "the body must be a JSON object"
    match problem["type"]:
        case "missing":
            return f"{field} is required"
        case "extra_forbidden":
            *path, name = problem["loc"][1:]
            return f"unknown field {shown(field)}{hint(str(name), field_names(body, path))}"
        case "model_type" | "model_attributes_type":
            return f"{field} must be an object, got {brief_json(problem['input'])}"
        case "value_error":
            return str(problem["ctx"]["error"])
    reason = problem["msg"].replace("Input should", f"{field} must", 1)
    return f"{reason}, got {brief_json(problem['input'])}"


def brief_json(value: Any) -> str:
    """Return a value of the body as the caller wrote it, cut to fit in a message."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return shown(value)
    return _brief.repr(value)


def _field(problem: dict[str, Any]) -> str | None:
    """Return the field at fault, such as `n` or `adapters[0].scale`; None for the whole body."""
    names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"][1:]]
    return "".join(names).removeprefix(".") if names else None


def _param(problem: dict[str, Any]) -> str | None:
    field = _field(problem)
    # An unknown field may have any name, also one that UTF-8 cannot say.
    return None if field is None else shown(field)[1:-1]
