"""Forms with files, read into the same fields that JSON bodies have."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from stepserve.api.bodies.nested_fields import NONE, Nested, is_nested, read_nested
from stepserve.api.bodies.reading import check_json
from stepserve.api.bodies.validation import invalid_request
from stepserve.api.errors import MalformedFormError, MalformedJsonError
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

Model = TypeVar("Model", bound=BaseModel)

MAX_FILES = 20
MAX_FIELDS = 100
MAX_DISPOSITION_BYTES = 1024
"""Of what names a field and its file; reading it takes time that grows with the square."""

LIST_SUFFIX = "[]"
"""OpenAI's clients name the files of a list so."""


@dataclass(frozen=True)
class Form:
    """What a form holds: text fields, and the content of its files by field; nothing empty.

    Args:
        nested: the texts of fields that are parts of one, such as `hires[scale]`.
    """

    fields: dict[str, str]
    files: dict[str, list[bytes]]
    nested: dict[str, list[str]]


async def read_form(request: Request) -> Form:
    """Read a multipart form.

    Raises:
        MalformedFormError: it is none, or its texts are not in UTF-8.
        InvalidRequestError: a text field occurs twice.
    """
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    nested: dict[str, list[str]] = {}
    try:
        async with _parsed(request) as form:
            for name, value in form.multi_items():
                if isinstance(value, str) and is_nested(name):
                    nested.setdefault(name, []).append(value)
                    continue
                if _is_left_empty(value):
                    continue
                if isinstance(value, UploadFile):
                    key = name.removesuffix(LIST_SUFFIX)
                    files.setdefault(key, []).append(await value.read())
                elif name in fields:
                    raise InvalidRequestError(f"{shown(name)} is given twice", name)
                else:
                    fields[name] = value
    except UnicodeDecodeError as error:
        raise MalformedFormError("the form's texts are not in UTF-8") from error
    except MultiPartException as error:
        raise MalformedFormError(f"the form cannot be read: {error.message}") from error
    return Form(fields, files, nested)


@asynccontextmanager
async def _parsed(request: Request) -> AsyncIterator[FormData]:
    parser = _Utf8Parser(
        request.headers, request.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS
    )
    form = await parser.parse()
    try:
        yield form
    finally:
        await form.close()


def _is_left_empty(value: UploadFile | str) -> bool:
    """Whether a field counts as absent: browsers send texts and files that nobody filled in."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return not value


class _Utf8Parser(MultiPartParser):
    """Raises UnicodeDecodeError where its base would take texts that are not UTF-8 for Latin-1.

    The form as a whole has been found not to name another charset, and nothing else may: parts
    cannot, nor a field `_charset_`, nor names written as RFC 2231 or 2047 have it.
    """

    def on_headers_finished(self) -> None:
        disposition = self._current_part.content_disposition or b""
        if len(disposition) > MAX_DISPOSITION_BYTES:
            raise MultiPartException(
                f"a Content-Disposition is {len(disposition)} bytes long; the limit is "
                f"{MAX_DISPOSITION_BYTES} bytes"
            )
        disposition.decode("utf-8")
        super().on_headers_finished()

    def on_part_end(self) -> None:
        if self._current_part.file is None:
            self._current_part.data.decode("utf-8")
        super().on_part_end()


def parse_fields(fields: Mapping[str, str], model: type[Model], nested: Nested = NONE) -> Model:
    """Read text fields as the types that `model` has; what JSON would not quote is read as JSON.

    Raises:
        InvalidRequestError: a field is unknown, or of another type.
    """
    known = model.model_fields
    values = {
        name: _read(text, known[name].annotation if name in known else None)
        for name, text in fields.items()
    }
    parts = read_nested(nested, model, _read)
    for name in values.keys() & parts.keys():
        raise InvalidRequestError(f"{shown(name)} is given twice", name)
    return parse_body(values | parts, model)


def _read(text: str, annotation: Any) -> Any:
    return text if _holds_text(annotation) else _as_json(text)


def parse_body(values: Any, model: type[Model]) -> Model:
    """Check the values of a body.

    Raises:
        InvalidRequestError: tells every problem.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [
            dict(problem) | {"loc": ("body", *problem["loc"])} for problem in error.errors()
        ]
        raise invalid_request(RequestValidationError(problems), model) from error


def _holds_text(annotation: Any) -> bool:
    # A list of texts is JSON.
    parts: Iterable[Any] = () if get_origin(annotation) is list else get_args(annotation)
    return annotation is str or isinstance(annotation, str) or any(map(_holds_text, parts))


def _as_json(text: str) -> Any:
    try:
        check_json(text.encode())
        return json.loads(text)
    except (ValueError, RecursionError, MalformedJsonError):
        # Left as it is, so that the message shows what was sent.
        return text
