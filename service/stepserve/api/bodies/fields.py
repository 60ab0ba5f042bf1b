"""What bodies of requests have in common: whole numbers, and fields that we do not know.

Clients learn new fields before we do. A field that we do not know is set aside, and the response
names it, unless it is likely meant as one of ours: then the request is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from stepserve.api.bodies.names import hint
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

MAX_UNKNOWN_FIELDS = 32
"""More are no client's fields."""

OPEN: Mapping[str, Any] = MappingProxyType({"additionalProperties": True})
"""For the schema of a body: fields that it does not list may be sent."""

# As client libraries name fields: in forms with brackets for what is inside them.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\[\]-]{0,63}")


def ignorable(names: Iterable[str], fields: Collection[str]) -> list[str]:
    """Return which of `names` may be set aside: neither known nor likely meant as one of `fields`.

    None may, where there are more than `MAX_UNKNOWN_FIELDS`.
    """
    unknown = [name for name in names if name not in fields]
    if len(unknown) > MAX_UNKNOWN_FIELDS:
        return []
    return [name for name in unknown if _is_ignorable(name, fields)]


def _is_ignorable(name: str, fields: Collection[str]) -> bool:
    # A slip in the name of a field that changes nothing changes nothing, either.
    return bool(_NAME.fullmatch(name)) and not hint(name, fields)


def ignored_queries(names: Iterable[str], body: type[BaseModel]) -> tuple[str, ...]:
    """Return the names of a URL's query, which changes nothing where the fields are in the body.

    Raises:
        InvalidRequestError: one is meant as a field of `body`, or is no client's parameter.
    """
    given = list(dict.fromkeys(names))
    fields = body.model_fields
    aside = ignorable(given, fields)
    wrong = next((name for name in given if name not in aside), None)
    if wrong is None:
        return tuple(aside)
    what = "; send it in the body" if wrong in fields else hint(wrong, fields)
    raise InvalidRequestError(f"unknown query parameter {shown(wrong)}{what}", shown(wrong)[1:-1])


def field_names(body: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """Return the fields of what stands at `path` in a body, for those who look for a name there."""
    for part in path:
        field = body.model_fields.get(str(part))
        body = body if field is None else body_in(field.annotation) or body
    return list(body.model_fields)


def body_in(annotation: Any) -> type[BaseModel] | None:
    """Return the body class that an annotation names, such as that of a list's entries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(body_in, get_args(annotation))), None)


def _whole(value: Any) -> Any:
    # JSON has one kind of number: a client may write 1 as 1.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
"""An integer, also one that is written as `1.0`."""


def _check_class_label(value: Any) -> Any:
    # A union would tell both of its branches in messages.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int | str):
        raise ValueError("class_label must be the number of a class, or its name")
    return whole


ClassLabel = Annotated[
    int | str, BeforeValidator(_check_class_label, json_schema_input_type=int | str)
]
"""The number of a class, or its name."""


class Body(BaseModel):
    """An object in a request: strict types; see the module for what is done with unknown fields."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, json_schema_extra=dict(OPEN)
    )

    _unknown: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _set_unknown_fields_aside(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        aside = ignorable(data, cls.model_fields)
        body = handler({name: value for name, value in data.items() if name not in aside})
        body._unknown = tuple(aside)
        return body

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """What was set aside, such as `adapters[0].colour`."""
        inner = (f"{place}.{name}" for place, body in self._inner() for name in body.unknown_fields)
        return (*self._unknown, *inner)

    def _inner(self) -> Iterator[tuple[str, Body]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Body):
                yield name, value
            if isinstance(value, list):
                bodies = ((f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Body))
                yield from bodies
