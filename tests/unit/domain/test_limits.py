from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.checks.limits import MAX_SEED, check_adapter_names, check_request
from stepserve.domain.checks.wording import did_you_mean, shown
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.requests import AdapterUse, GenerationRequest
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.domain.tasks import Task
from usual_tasks import USUAL_TASKS

MODEL = ModelCapabilities(
    id="emoji",
    description="small",
    sizes=SizeRange(minimum=48, maximum=128, step=16, native=64),
    schedulers=("ddim", "euler", "euler_ancestral"),
    default_scheduler="euler",
    max_num_inference_steps=100,
    max_guidance_scale=12.5,
    max_n=4,
    max_prompt_characters=20,
    adapters=("pixels", "ink.v2"),
    max_adapters=2,
    unusable_schedulers=("heun",),
    tasks={task: USUAL_TASKS[task] for task in (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE)},
)
VALID = GenerationRequest(
    id="r",
    model="emoji",
    prompt="cat",
    width=64,
    height=64,
    num_inference_steps=20,
    guidance_scale=4.0,
    seed=0,
    scheduler="euler",
)

FROM_IMAGE: dict[str, Any] = {"task": Task.IMAGE_TO_IMAGE, "images": (b"x",)}


def adapters(**scales: float) -> tuple[AdapterUse, ...]:
    return tuple(AdapterUse(name, scale) for name, scale in scales.items())


SIDES = st.integers(0, 5).map(lambda steps: 48 + 16 * steps)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    request=st.builds(
        GenerationRequest,
        id=st.just("r"),
        model=st.just("emoji"),
        prompt=TEXT.filter(str.strip),
        width=SIDES,
        height=SIDES,
        num_inference_steps=st.integers(1, 100),
        guidance_scale=st.floats(1.1, 12.5),
        seed=st.integers(0, MAX_SEED - 3),
        scheduler=st.sampled_from(MODEL.schedulers),
        negative_prompt=TEXT,
        n=st.integers(1, 4),
        adapters=st.lists(
            st.builds(AdapterUse, name=TEXT, scale=st.floats(-10, 10)),
            max_size=2,
            unique_by=lambda use: use.name,
        ).map(tuple),
    )
)
def test_everything_within_the_limits_passes(request: GenerationRequest):
    check_request(request, MODEL)


@pytest.mark.parametrize(
    ("change", "field", "parts"),
    [
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": " \n\u3000"}, "prompt", ["empty"]),
        ({"prompt": "x" * 21}, "prompt", ["21 characters", "20"]),
        ({"prompt": "a\udfff"}, "prompt", ["Unicode", "'a\\udfff'"]),
        ({"negative_prompt": "x" * 21}, "negative_prompt", ["21 characters", "20"]),
        ({"negative_prompt": "\ud800"}, "negative_prompt", ["Unicode"]),
        ({"width": 144}, "size", ["144x64", "48 to 128 in steps of 16"]),
        ({"height": 63}, "size", ["64x63", "48 to 128 in steps of 16"]),
        ({"height": -64}, "size", ["64x-64"]),
        ({"num_inference_steps": 0}, "num_inference_steps", ["1 to 100", "got 0"]),
        ({"num_inference_steps": 101}, "num_inference_steps", ["1 to 100", "got 101"]),
        ({"guidance_scale": -0.5}, "guidance_scale", ["0 to 12.5", "got -0.5"]),
        ({"guidance_scale": 12.6}, "guidance_scale", ["0 to 12.5", "got 12.6"]),
        ({"guidance_scale": math.nan}, "guidance_scale", ["0 to 12.5", "got nan"]),
        ({"guidance_scale": math.inf}, "guidance_scale", ["0 to 12.5", "got inf"]),
        ({"n": 0}, "n", ["1 to 4", "got 0"]),
        ({"n": 5}, "n", ["1 to 4", "got 5"]),
        ({"scheduler": "ddmi"}, "scheduler", ["'ddmi'", "did you mean 'ddim'?", "euler"]),
        (
            {"scheduler": "heun"},
            "scheduler",
            ["'heun' cannot be used by model", "can use: ddim, euler"],
        ),
        ({"scheduler": "x"}, "scheduler", ["'x'", "ddim, euler, euler_ancestral"]),
        ({"adapters": adapters(a=1, b=1, c=1)}, "adapters", ["at most 2", "emoji", "got 3"]),
        ({"adapters": adapters(a=1) * 2}, "adapters", ["'a' is named more than once"]),
        ({"adapters": adapters(a=-10.5)}, "adapters", ["'a'", "-10 to 10", "got -10.5"]),
        ({"adapters": adapters(a=math.nan)}, "adapters", ["-10 to 10", "got nan"]),
        ({"seed": -1}, "seed", [f"0 to {MAX_SEED}", "got -1"]),
        ({"guidance_start": -0.1}, "guidance_start", ["at least 0", "got -0.1"]),
        ({"guidance_start": 1.0}, "guidance_start", ["less than 1", "got 1.0"]),
        ({"guidance_start": math.nan}, "guidance_start", ["got nan"]),
        ({"guidance_end": 1.1}, "guidance_end", ["at most 1", "got 1.1"]),
        ({"guidance_end": 0.0}, "guidance_end", ["over guidance_start (0.0)", "got 0.0"]),
        (
            {"guidance_start": 0.5, "guidance_end": 0.5},
            "guidance_end",
            ["over guidance_start (0.5)", "got 0.5"],
        ),
        ({"guidance_end": math.nan}, "guidance_end", ["got nan"]),
        (
            {"step_cache": StepCacheUse(StepCacheMethod.MAGCACHE)},
            "step_cache.method",
            ["'magcache'", "'emoji'", "usable: easycache"],
        ),
        (
            {"step_cache": StepCacheUse(threshold=0.0)},
            "step_cache.threshold",
            ["0.001 to 1", "got 0.0"],
        ),
        ({"step_cache": StepCacheUse(threshold=1.5)}, "step_cache.threshold", ["got 1.5"]),
        ({"step_cache": StepCacheUse(threshold=math.nan)}, "step_cache.threshold", ["got nan"]),
        ({"deadline_s": 0.0}, "deadline_s", ["at least 0.001 seconds", "got 0.0"]),
        ({"deadline_s": 5e-324}, "deadline_s", ["at least 0.001 seconds", "got 5e-324"]),
        ({"deadline_s": -1.0}, "deadline_s", ["at least 0.001 seconds", "got -1.0"]),
        ({"deadline_s": math.nan}, "deadline_s", ["got nan"]),
        ({"deadline_s": math.inf}, "deadline_s", ["got inf"]),
        (FROM_IMAGE | {"strength": 0.0}, "strength", ["over 0", "at most 1", "got 0.0"]),
        (FROM_IMAGE | {"strength": 1.1}, "strength", ["over 0", "at most 1", "got 1.1"]),
        (FROM_IMAGE | {"strength": math.nan}, "strength", ["got nan"]),
        ({"task": Task.INPAINTING}, "model", ["inpainting", "text-to-image, image-to-image"]),
        (
            FROM_IMAGE | {"strength": 0.04},
            "strength",
            ["0.04 of 20 steps", "at least 0.05"],
        ),
        ({"seed": MAX_SEED + 1}, "seed", [f"0 to {MAX_SEED}", f"got {MAX_SEED + 1}"]),
    ],
)
def test_the_message_names_field_value_and_limit(
    change: dict[str, object], field: str, parts: list[str]
):
    with pytest.raises(InvalidRequestError) as caught:
        check_request(replace(VALID, **cast(Any, change)), MODEL)

    assert caught.value.field == field
    assert caught.value.message.startswith(field)
    for part in parts:
        assert part in caught.value.message


@given(
    width=st.integers(-10, 200),
    height=st.integers(-10, 200),
    steps=st.integers(-2, 120),
    n=st.integers(-1, 6),
)
def test_exactly_the_numbers_within_bounds_pass(width: int, height: int, steps: int, n: int):
    request = replace(VALID, width=width, height=height, num_inference_steps=steps, n=n)
    is_within = (
        {width, height} <= set(range(48, 129, 16)) and steps in range(1, 101) and n in range(1, 5)
    )
    try:
        check_request(request, MODEL)
    except InvalidRequestError:
        assert not is_within
    else:
        assert is_within


@given(n=st.integers(1, 4), below=st.integers(-3, 3))
def test_the_seed_of_every_image_can_be_sent_again(n: int, below: int):
    request = replace(VALID, n=n, seed=MAX_SEED - below)
    if below >= n - 1:
        check_request(request, MODEL)
        for image in range(n):
            check_request(replace(request, n=1, seed=request.seed + image), MODEL)
    else:
        with pytest.raises(InvalidRequestError, match=f"for n={n}"):
            check_request(request, MODEL)


def test_long_values_do_not_flood_the_message():
    for change in ({"scheduler": "x" * 10_000}, {"seed": 10**5000}, {"n": -(10**5000)}):
        with pytest.raises(InvalidRequestError) as caught:
            check_request(replace(VALID, **change), MODEL)
        assert len(caught.value.message) < 250


def test_bounds_belong_to_the_model():
    check_request(replace(VALID, n=5), replace(MODEL, max_n=5))
    with pytest.raises(InvalidRequestError, match="'other'"):
        check_request(VALID, replace(MODEL, id="other", sizes=SizeRange(128, 256, 8, 128)))


@given(steps=st.integers(1, 100), strength=st.floats(0.001, 1))
def test_strengths_that_leave_a_step_pass(steps: int, strength: float):
    request = replace(
        VALID,
        task=Task.IMAGE_TO_IMAGE,
        images=(b"x",),
        num_inference_steps=steps,
        strength=strength,
    )
    if int(steps * strength) >= 1:
        check_request(request, MODEL)
    else:
        with pytest.raises(InvalidRequestError, match="leaves no step"):
            check_request(request, MODEL)


def test_a_strength_without_an_image_is_refused():
    with pytest.raises(InvalidRequestError, match="strength must be left out") as caught:
        check_request(replace(VALID, strength=0.5), MODEL)
    assert caught.value.field == "strength"


@pytest.mark.parametrize(
    ("task", "image", "mask", "message"),
    [
        (Task.TEXT_TO_IMAGE, False, False, None),
        (Task.TEXT_TO_IMAGE, True, False, "image must be left out: text-to-image"),
        (Task.IMAGE_TO_IMAGE, True, False, None),
        (Task.IMAGE_TO_IMAGE, False, False, "image is required by image-to-image"),
        (Task.IMAGE_TO_IMAGE, True, True, "mask must be left out: image-to-image"),
        (Task.INPAINTING, True, True, None),
        (Task.INPAINTING, True, False, "mask is required by inpainting"),
    ],
)
def test_each_task_takes_its_images(task: Task, image: bool, mask: bool, message: str | None):
    model = replace(MODEL, tasks=USUAL_TASKS)
    request = replace(
        VALID, task=task, images=(b"x",) if image else (), mask=b"x" if mask else None
    )
    if message is None:
        check_request(request, model)
        return
    with pytest.raises(InvalidRequestError) as caught:
        check_request(request, model)
    assert caught.value.message.startswith(f"{message} with model 'emoji'")
    assert caught.value.field == message.split()[0]


@pytest.mark.parametrize(
    ("interval", "field"), [((0.2, 1.0), "guidance_start"), ((0.0, 0.9), "guidance_end")]
)
def test_intervals_are_refused_where_the_model_has_none(interval: tuple[float, float], field: str):
    model = replace(MODEL, guidance_interval=False)
    request = replace(VALID, guidance_start=interval[0], guidance_end=interval[1])
    check_request(request, MODEL)
    check_request(VALID, model)
    with pytest.raises(InvalidRequestError, match="'emoji' applies guidance at every step") as no:
        check_request(request, model)
    assert no.value.field == field


def test_did_you_mean():
    assert did_you_mean("sede", ["seed", "size"]) == "; did you mean 'seed'?"
    assert did_you_mean("quality", ["seed", "size"]) == ""
    # As a whole word of a name, although "style" is more alike.
    assert did_you_mean("steps", ["style", "num_inference_steps"]).endswith("num_inference_steps'?")


@given(text=st.text(st.characters(), max_size=200))
def test_shown_is_printable_ascii_of_bounded_length(text: str):
    assert shown(text).isascii()
    assert shown(text).isprintable()
    assert len(shown(text)) <= 10 * 80 + 5


def test_adapters_must_be_known_by_name():
    check_adapter_names(adapters(pixels=1), MODEL.adapters)
    check_adapter_names((), ())
    with pytest.raises(InvalidRequestError) as caught:
        check_adapter_names((AdapterUse("pixels"), AdapterUse("ink.v1")), MODEL.adapters)
    assert caught.value.field == "adapters"
    assert caught.value.message == (
        "adapters: 'ink.v1' is not known; did you mean 'ink.v2'? (known: pixels, ink.v2)"
    )
    with pytest.raises(InvalidRequestError, match=r"'x' is not known \(known: none\)"):
        check_adapter_names(adapters(x=1), ())


def test_a_thousand_adapters_do_not_flood_the_message():
    known = [f"adapter-{index}" for index in range(1000)]
    with pytest.raises(InvalidRequestError) as caught:
        check_adapter_names(adapters(x=1), known)
    assert len(caught.value.message) < 500
    assert caught.value.message.endswith(", adapter-19, ...)")


def test_a_model_without_adapters_says_so():
    with pytest.raises(
        InvalidRequestError, match="model 'emoji' has none, got 'a'; leave them out"
    ):
        check_request(replace(VALID, adapters=adapters(a=1)), replace(MODEL, max_adapters=0))
