"""What `hires` may be, and what the phases of such a request are."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.checks.limits import check_request
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities, SizeRange, StepRange
from stepserve.domain.requests import GenerationRequest, Hires
from stepserve.domain.tasks import ONE, Role, Task
from usual_tasks import USUAL_TASKS

MODEL = ModelCapabilities(
    id="emoji",
    description="small",
    sizes=SizeRange(minimum=48, maximum=128, step=16, native=64),
    schedulers=("ddim", "euler"),
    default_scheduler="euler",
    max_num_inference_steps=100,
    scheduler_steps={"ddim": StepRange(4, 50)},
    tasks=USUAL_TASKS,
)


def enlarged(scale: float = 2.0, side: int = 64, **changes: Any) -> GenerationRequest:
    usual: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 10}
    finite_px = scale * side if math.isfinite(scale) else side
    larger = MODEL.sizes.nearest(finite_px)
    hires = Hires(scale=scale, width=larger, height=larger, **usual | changes)
    return replace(MODEL.usual_request("r"), prompt="cat", width=side, height=side, hires=hires)


def refusal(request: GenerationRequest, model: ModelCapabilities = MODEL) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequestError) as refused:
        check_request(request, model)
    return refused.value.field, refused.value.message


@pytest.mark.parametrize(
    ("scale", "side", "message"),
    [
        (1.0, 64, "hires.scale must be over 1 and at most 4, got 1.0"),
        (4.5, 64, "hires.scale must be over 1 and at most 4, got 4.5"),
        (math.nan, 64, "hires.scale must be over 1 and at most 4, got nan"),
        (math.inf, 64, "hires.scale must be over 1 and at most 4, got inf"),
        (1.1, 64, "hires.scale 1.1 makes 64x64 of size 64x64, which is no larger"),
        (3.0, 64, "hires.scale 3 makes 192x192 of size 64x64, and each side must be 48 to 128"),
        (3.0, 64, "choose at most 2, or a smaller size"),
        (2.0, 96, "choose at most 1.33, or a smaller size"),
        (2.0, 128, "choose a smaller size"),
    ],
)
def test_the_enlarged_size_must_fit_the_model(scale: float, side: int, message: str) -> None:
    field, told = refusal(enlarged(scale, side))
    assert field == "hires.scale"
    assert message in told


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"strength": 0.0}, "hires.strength", "hires.strength must be over 0 and at most 1"),
        ({"strength": 1.5}, "hires.strength", "hires.strength must be over 0 and at most 1"),
        ({"strength": 0.05}, "hires.strength", "with hires.num_inference_steps 10 it must be at"),
        ({"num_inference_steps": 0}, "hires.num_inference_steps", "must be 1 to 100, got 0"),
        ({"num_inference_steps": 101}, "hires.num_inference_steps", "must be 1 to 100, got 101"),
    ],
)
def test_the_refinement_has_the_limits_of_image_to_image(
    changes: dict[str, Any], field: str, message: str
) -> None:
    named, told = refusal(enlarged(**changes))
    assert named == field
    assert message in told


def test_its_steps_are_within_those_of_the_scheduler() -> None:
    request = replace(enlarged(num_inference_steps=3), scheduler="ddim")
    field, told = refusal(request)
    assert (field, "must be 4 to 50, got 3" in told) == ("hires.num_inference_steps", True)


def test_a_model_without_image_to_image_has_none() -> None:
    model = replace(MODEL, tasks={Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE}})
    field, told = refusal(enlarged(), model)
    assert field == "hires"
    assert "text-to-image with model 'emoji' does not take one" in told
    assert "it takes: prompt" in told


@given(
    st.floats(1.0, 4.0, exclude_min=True),
    st.sampled_from(range(48, 129, 16)),
    st.floats(0.1, 1),
    st.integers(10, 100),
)
def test_what_is_let_in_ends_at_a_size_of_the_model(
    scale: float, side: int, strength: float, steps: int
) -> None:
    request = enlarged(scale, side, strength=strength, num_inference_steps=steps)
    small, large = request.phases
    is_larger = large.size != small.size
    fits = is_larger and MODEL.sizes.accepts(large.width)
    with nullcontext() if fits else pytest.raises(InvalidRequestError, match=r"^hires\.scale"):
        check_request(request, MODEL)
    assert small.hires is large.hires is None
    assert (small.task, large.task) == (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE)
    assert small.size == request.size
    assert large.size == request.final_size
    assert abs(large.width - scale * side) <= MODEL.sizes.step / 2
    assert request.expected_steps == small.expected_steps + large.expected_steps
    assert large.expected_steps == math.ceil(steps * strength)


def test_a_request_without_it_has_one_phase() -> None:
    request = replace(enlarged(), hires=None)
    assert request.phases == (request,)
    assert request.final_size == request.size == "64x64"
    assert request.expected_steps == request.num_inference_steps
