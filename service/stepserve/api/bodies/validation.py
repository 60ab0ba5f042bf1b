"""From what FastAPI and pydantic say about a wrong body to messages for the caller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import Repr
from types import MappingProxyType
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from stepserve.api.bodies.fields import field_names
from stepserve.api.bodies.names import hint
from stepserve.api.errors import MalformedJsonError
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

MAX_PROBLEMS = 5

_FILE = "data:image/png;base64,..."
EXAMPLES: Mapping[str, Any] = MappingProxyType(
    {
        "image": {"image_url": _FILE},
        "images": [{"image_url": _FILE}],
        "mask": {"image_url": _FILE},
        "controls": [{"name": "depth", "image": _FILE}],
        "references": [{"image": _FILE, "scale": 0.6}],
        "adapters": [{"name": "ink", "scale": 0.8}],
        "prompts": ["red heart", "smiling cat"],
        "hires": {"scale": 2},
        "step_cache": {"method": "easycache", "threshold": 0.15},
    }
)
"""How the fields are written that are lists or objects."""

_brief = Repr()
_brief.maxstring = 80


def invalid_request(error: RequestValidationError, body: type[BaseModel]) -> InvalidRequestError:
    """Return one error that tells every problem of the body (the first few, if very many).

    Args:
        error: as raised by FastAPI.
        body: what it was checked as; its fields are what an unknown one may be meant as.
    """
    # What is missing is often there, under the name that another problem is about.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
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
            reason = f"{field} must be an object{_such_as(problem)}"
        case "list_type":
            reason = f"{field} must be a list{_such_as(problem)}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            reason = problem["msg"].replace("Input should", f"{field} must", 1)
    return f"{reason}, got {brief_json(problem['input'])}{_what_to_do(problem, body)}"


def _such_as(problem: dict[str, Any]) -> str:
    """An example of what is wanted, where there is one of its field, or of an entry of it."""
    *path, name = problem["loc"][1:]
    example = EXAMPLES.get(name) if isinstance(name, str) else EXAMPLES.get(path[-1], [None])[0]
    return "" if example is None else f" such as {json.dumps(example)}"


def _what_to_do(problem: dict[str, Any], body: type[BaseModel]) -> str:
    """A remedy where several values stand in the place of one, or a text where JSON is wanted."""
    *path, name = problem["loc"][1:]
    given = problem["input"]
    if isinstance(given, list) and f"{name}s" in field_names(body, path):
        return f"; several go into '{name}s'"
    is_json_wanted = problem["type"] in ("list_type", "model_type", "model_attributes_type")
    if is_json_wanted and isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        return _json_fault(given)
    return ""


def _json_fault(text: str) -> str:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"; that is not valid JSON: {error.msg} (at character {error.pos})"
    except (ValueError, RecursionError):
        return "; that is not valid JSON"
    return "; that is a text: write it without quotes around it"


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
