"""Fields of forms that stand for what is inside a field of JSON, as OpenAI's clients send them.

A list of objects becomes `controls[][name]` and `controls[][scale]`, an object `hires[scale]`, a
list of texts `prompts[]`. All of one name may come before those of the next, so the first
`controls[][scale]` belongs to the first entry, wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from stepserve.api.bodies.fields import body_in
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

Nested = Mapping[str, Sequence[str]]
"""The texts of fields with brackets in their names, by name, in order."""

Read = Callable[[str, Any], Any]
"""Reads a text as the annotation of its field wants it."""

NONE: Nested = MappingProxyType({})

_NAME = re.compile(r"([a-z_]+)(\[\])?((?:\[[a-z_]+\])*)")
_KEY = re.compile(r"[a-z_]+")


def is_nested(name: str) -> bool:
    """Whether a name says what it is inside of."""
    return "[" in name


def read_nested(nested: Nested, model: type[BaseModel], read: Read) -> dict[str, Any]:
    """Put together the fields of `model` that were sent in parts.

    Args:
        nested: names that no field of `model` can have stay as they are, with their first text.
        read: of one text.

    Raises:
        InvalidRequestError: it cannot be told which entry of a list a text belongs to, or a field
            is sent in two ways.
    """
    values: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, texts in nested.items():
        match = _NAME.fullmatch(name)
        field = model.model_fields.get(match[1]) if match else None
        if match is None or field is None or not _has_parts(field.annotation):
            values[name] = texts[0]
            continue
        root, keys = match[1], _KEY.findall(match[3])
        read_texts = [read(text, _annotation_at(field.annotation, keys)) for text in texts]
        if match[2]:
            counts.setdefault(root, {})[name] = len(texts)
            _add_entries(values, root, keys, read_texts)
        elif len(texts) > 1:
            raise InvalidRequestError(f"{shown(name)} is given twice", root)
        else:
            _put(_part(values, root, {}, root), keys, read_texts[0], root)
    for root, by_name in counts.items():
        _check_counts(root, by_name)
    return values


def _has_parts(annotation: Any) -> bool:
    return body_in(annotation) is not None or _entry_of(annotation) is not None


def _entry_of(annotation: Any) -> Any:
    """What the entries of a list are, or None where an annotation has no list."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return next(filter(None, map(_entry_of, get_args(annotation))), None)


def _annotation_at(annotation: Any, keys: Sequence[str]) -> Any:
    if not keys:
        return _entry_of(annotation) or annotation
    body = body_in(annotation)
    field = None if body is None else body.model_fields.get(keys[0])
    # What is unknown is told as it was sent.
    return str if field is None else _annotation_at(field.annotation, keys[1:])


def _add_entries(
    values: dict[str, Any], root: str, keys: Sequence[str], texts: Sequence[Any]
) -> None:
    entries = _part(values, root, [], root)
    if not keys:
        entries += texts
        return
    entries += [{} for _ in range(len(texts) - len(entries))]
    for entry, text in zip(entries, texts, strict=False):
        _put(entry, keys, text, root)


def _put(place: Any, keys: Sequence[str], value: Any, root: str) -> None:
    for key in keys[:-1]:
        place = _part(place, key, {}, root)
    if not isinstance(place, dict) or keys[-1] in place:
        raise _sent_in_two_ways(root)
    place[keys[-1]] = value


def _part(place: Any, key: str, empty: Any, root: str) -> Any:
    """What stands at `key`; `empty` is put there where nothing does."""
    if not isinstance(place, dict) or not isinstance(place.setdefault(key, empty), type(empty)):
        raise _sent_in_two_ways(root)
    return place[key]


def _check_counts(root: str, by_name: Mapping[str, int]) -> None:
    if len(by_name) > 1 and f"{root}[]" in by_name:
        raise _sent_in_two_ways(root)
    if len(set(by_name.values())) > 1:
        told = ", ".join(f"{shown(name)} {count} times" for name, count in by_name.items())
        raise InvalidRequestError(
            f"{root}: its entries cannot be told apart, as the form has {told}: give every entry "
            f"the same keys, or send {root} as JSON in one field",
            root,
        )


def _sent_in_two_ways(root: str) -> InvalidRequestError:
    return InvalidRequestError(f"{root} is sent in two ways: send it as JSON in one field", root)
