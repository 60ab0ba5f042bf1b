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

from stepserve.domain.checks.wording import SHORTEST_PART, closest, shown
from stepserve.domain.errors import InvalidRequestError

MAX_UNKNOWN_FIELDS = 32
"""More are no client's fields."""

AS_EVER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "user": (),
        "safety_identifier": (),
        "quality": ("auto",),
        "moderation": ("auto",),
        "style": (),
        "background": ("auto", "opaque"),
        "complexity": (),
        "input_fidelity": (),
        "frame_count": (),
        "frame_duration_ms": (),
        "svg": (),
    }
)
"""OpenAI's fields that change nothing here, and their values that ask for nothing else."""

LIKENESS = 0.75
"""From which on a name is a slip of the pen (`sede`). Below are words: `store` is no `stream`."""

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
UPSCALE = "/v1/images/upscale"
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("image", "images", "mask", "strength"), EDITS),
        "hires": GENERATIONS,
        "noise_level": UPSCALE,
    }
)
"""Which URL takes fields without which another image would be made, where a body has them not."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "width": "size",
        "height": "size",
        "aspect_ratio": "size",
        "num_images": "n",
        "num_images_per_prompt": "n",
        "num_outputs": "n",
        "batch_size": "n",
        "sampler": "scheduler",
        "sampler_name": "scheduler",
        "cfg": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "lora": "adapters",
        "loras": "adapters",
        "image_url": "image",
        "init_image": "image",
        "mask_image": "mask",
        "mask_url": "mask",
        "ip_adapter_image": "references",
        "controlnet": "controls",
        "controlnets": "controls",
        "controlnet_conditioning_scale": "controls",
        "ip_adapters": "references",
        "enable_hr": "hires",
        "hires_fix": "hires",
        "hr_scale": "hires",
        "hr_second_pass_steps": "hires",
    }
)
"""What other servers call fields of ours. Setting one aside would make another image."""

OPEN: Mapping[str, Any] = MappingProxyType({"additionalProperties": True})
"""For the schema of a body: fields that it does not list may be sent."""

# As client libraries name fields: in forms with brackets for what is inside them.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\[\]-]{0,63}")


def hint(name: str, fields: Iterable[str]) -> str:
    """Return what to do about an unknown `name` that is likely meant as a field; else nothing.

    Forms say what is inside a field in brackets: `adapters[][name]`.
    """
    base = name.partition("[")[0]
    meant = _meant_as(base, [field for field in fields if field not in AS_EVER])
    if meant:
        return f"; did you mean {meant!r}?"
    return f"; {ELSEWHERE[base]} takes it" if base in ELSEWHERE else ""


def _meant_as(name: str, fields: list[str]) -> str | None:
    if name in fields:
        return name
    if name in ELSEWHERE:
        return None
    other = OTHER_NAMES.get(name.lower())
    if other in fields:
        return other
    words = {w: f for f in fields for w in f.split("_") if len(w) >= SHORTEST_PART}
    return closest(name, fields, LIKENESS) or words.get(closest(name, words, LIKENESS) or "")


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
        body = body if field is None else _body_in(field.annotation) or body
    return list(body.model_fields)


def _body_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_body_in, get_args(annotation))), None)


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
