from __future__ import annotations

import io
import json
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stepserve.domain.requests import GenerationRequest, OutputFormat
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.pipelines.requests.images import (
    EXIF_ASCII,
    EXIF_SECTION,
    EXIF_USER_COMMENT,
    encode_image,
)
from tiny_model import a_request

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
requests = st.builds(
    GenerationRequest,
    id=st.text("abc", min_size=1),
    model=text,
    prompt=text,
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    num_inference_steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 30),
    seed=st.integers(0, 2**53 - 10),
    scheduler=text,
    negative_prompt=text,
    n=st.integers(1, 8),
    output_format=st.sampled_from(OutputFormat),
    step_cache=st.none()
    | st.builds(StepCacheUse, st.sampled_from(StepCacheMethod), st.floats(0.001, 1)),
)


def drawn_image(shade: int = 120) -> Image.Image:
    return Image.linear_gradient("L").resize((16, 16)).convert("RGB").point(lambda v: v % shade)


def read_step_cache(told: Any) -> StepCacheUse | None:
    return None if told == "off" else StepCacheUse(**told)


def parameters_in(data: bytes) -> dict[str, object]:
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        return json.loads(image.info["parameters"])
    comment = image.getexif().get_ifd(EXIF_SECTION)[EXIF_USER_COMMENT]
    assert comment.startswith(EXIF_ASCII)
    return json.loads(comment.removeprefix(EXIF_ASCII))


@settings(max_examples=50)
@given(requests, st.integers(0, 7))
def test_a_image_tells_the_request_that_makes_it_again(
    request: GenerationRequest, index: int
) -> None:
    encoded = encode_image(drawn_image(), request, index)
    told = parameters_in(encoded.data)
    assert str(told.pop("software")).startswith("stepserve ")
    told["adapters"] = tuple(cast(Any, told["adapters"]))
    told["step_cache"] = read_step_cache(told["step_cache"])
    again = GenerationRequest(**cast(Any, told), id=request.id, output_format=request.output_format)
    wanted = {"seed": request.seed + index, "n": 1}
    assert again == GenerationRequest(**{**vars(request), **wanted})
    assert encoded.seed == again.seed


@pytest.mark.parametrize("output_format", OutputFormat)
def test_same_image_and_parameters_same_bytes(output_format: OutputFormat) -> None:
    one = encode_image(drawn_image(), a_request(id="a", output_format=output_format), 0)
    other = encode_image(drawn_image(), a_request(id="b", output_format=output_format), 0)
    assert one == other
    assert one.data != encode_image(drawn_image(90), a_request(output_format=output_format), 0).data


def test_a_image_of_a_batch_has_the_bytes_of_the_same_image_alone() -> None:
    of_batch = encode_image(drawn_image(), a_request(seed=5, n=4), 2)
    assert of_batch == encode_image(drawn_image(), a_request(seed=7, n=1), 0)


@pytest.mark.parametrize(
    ("output_format", "media_type"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_files_can_be_decoded(output_format: str, media_type: str) -> None:
    encoded = encode_image(drawn_image(), a_request(output_format=OutputFormat(output_format)), 0)
    image = Image.open(io.BytesIO(encoded.data))
    image.load()
    assert encoded.media_type == media_type == Image.MIME[image.format]
    assert image.size == (16, 16)
    if output_format == "png":
        assert image.tobytes() == drawn_image().tobytes()


def test_long_prompts_fit_into_every_format() -> None:
    for output_format in OutputFormat:
        request = a_request(
            prompt="\U0001f600" * 1000, negative_prompt="é" * 1000, output_format=output_format
        )
        assert (
            parameters_in(encode_image(drawn_image(), request, 0).data)["prompt"] == request.prompt
        )
