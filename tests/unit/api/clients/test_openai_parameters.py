"""Every parameter of OpenAI's client and every value that its types list, tried one by one.

A new version of the client with a parameter or value that nobody has thought about fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import openai
import pytest
from api_fakes import EMOJI, FakeBackend
from openai.resources.images import Images
from openai.types import (
    image_create_variation_params,
    image_edit_params,
    image_generate_params,
)
from running_clients import drawn_image
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.models import SizeRange
from usual_tasks import USUAL_TASKS

# Of the client itself; they send nothing of their own, or what a user makes up.
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
FILES = {"image": ("a.png", drawn_image("RGB")), "mask": ("m.png", drawn_image())}
NEEDED: dict[str, dict[str, Any]] = {
    "generate": {"prompt": "cat"},
    "edit": {"prompt": "cat", "image": FILES["image"]},
    "create_variation": {"image": FILES["image"]},
}
PARAMS = {
    "generate": image_generate_params.ImageGenerateParamsBase,
    "edit": image_edit_params.ImageEditParamsBase,
    "create_variation": image_create_variation_params.ImageCreateVariationParams,
}
# Where types list no values.
SAMPLES: MappingProxyType[str, Any] = MappingProxyType(
    {
        **FILES,
        "prompt": "dog",
        "n": 2,
        "user": "someone",
        "safety_identifier": "someone",
        "output_compression": 100,
        "partial_images": 0,
        "frame_count": 9,
        "frame_duration_ms": 200,
        "svg": {"model": "gpt-6", "reasoning": {"effort": "low"}},
        "markup": FILES["mask"],
        "stream": False,
    }
)
WITHOUT_EFFECT = {
    "user",
    "safety_identifier",
    "quality",
    "moderation",
    "style",
    "background",
    "complexity",
    "input_fidelity",
    "frame_count",
    "frame_duration_ms",
    "svg",
}
AS_EVER = {"quality": ("auto",), "moderation": ("auto",), "background": ("auto", "opaque")}
# What was asked for would be something else altogether: other files, or another image.
REFUSED = {"output_format": ("gif", "svg"), "markup": (FILES["mask"],)}


def literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from literals(part)


def tried() -> Iterator[tuple[str, str, Any]]:
    """Method, parameter and value."""
    for method, params in PARAMS.items():
        hints = get_type_hints(params)
        names = inspect.signature(getattr(Images, method)).parameters
        for name in names:
            if name in OF_THE_CLIENT:
                continue
            values = list(literals(hints.get(name))) or [SAMPLES.get(name)]
            for value in values:
                yield method, name, value


CASES = list(tried())


@pytest.fixture(scope="module")
def aliases() -> tuple[str, ...]:
    return tuple({value for _, name, value in CASES if name == "model"})


@pytest.fixture
def call(
    server_port: int, backend: FakeBackend, aliases: tuple[str, ...]
) -> Iterator[Callable[..., Any]]:
    sizes = SizeRange(minimum=64, maximum=2048, step=64, native=64)
    served = replace(EMOJI, tasks=USUAL_TASKS, aliases=aliases, sizes=sizes)
    backend.statuses = [ModelStatus(served, ready=True)]
    url = f"http://127.0.0.1:{server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=10) as ai:
        yield lambda method, **given: getattr(ai.images, method)(**NEEDED[method] | given)


def test_every_parameter_is_thought_about():
    unknown = {name for _, name, value in CASES if value is None}

    assert not unknown, f"new parameters of OpenAI's client: {unknown}"
    assert len(CASES) > 60


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", PARAMS)
def test_every_value_does_what_is_documented(method: str, call: Callable[..., Any]):
    for of_method, name, value in CASES:
        if of_method != method:
            continue
        if value in REFUSED.get(name, ()):
            with pytest.raises(openai.BadRequestError) as caught:
                call(method, **{name: value})
            assert caught.value.param == name
            continue
        response = call(method, **{name: value})
        named = (response.model_extra or {}).get("ignored_fields", [])
        is_used = name not in WITHOUT_EFFECT or value in AS_EVER.get(name, ())
        # A form says what is inside a field in its name.
        assert {field.partition("[")[0] for field in named} == (set() if is_used else {name})


def test_streams_take_the_same(call: Callable[..., Any]):
    fields = {"background": "transparent", "safety_identifier": "someone", "quality": "high"}
    for method, kind in (("generate", "image_generation"), ("edit", "image_edit")):
        with call(method, stream=True, partial_images=1, **fields) as events:
            told = list(events)
        assert [event.type for event in told] == [f"{kind}.partial_image", f"{kind}.completed"]
        assert set(told[-1].model_extra["ignored_fields"]) == set(fields)
        assert (told[-1].background, told[-1].quality) == ("opaque", "auto")
