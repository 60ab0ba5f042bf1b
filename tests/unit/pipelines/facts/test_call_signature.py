from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    DiTPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    KarrasVePipeline,
    LDMPipeline,
    PNDMPipeline,
    ScoreSdeVePipeline,
    StableDiffusionPipeline,
)
from stepserve.domain.tasks import Task
from stepserve.pipelines.facts.capabilities import check_is_served
from stepserve.pipelines.facts.pipeline_tasks import pipeline_tasks
from stepserve.pipelines.facts.signature import CallSignature, accepted_arguments, read_signature


class Older:
    """A pipeline from before callbacks on step end, with settings of its own."""

    def __call__(self, prompt: Any, strictness: int, *ids: int, fast: bool = True) -> None: ...


class Open:
    def __call__(self, prompt: Any = None, **kwargs: Any) -> None: ...


def callback(*args: Any) -> dict[str, Any]:
    return {}


WANTED = {
    "prompt": "heart",
    "negative_prompt": None,
    "guidance_scale": 3.0,
    "num_images_per_prompt": 2,
    "callback_on_step_end": callback,
    "callback_on_step_end_tensor_inputs": ["latents"],
}


def test_stable_diffusion_takes_everything() -> None:
    signature = read_signature(StableDiffusionPipeline)
    assert signature.needed == {"prompt"}
    assert accepted_arguments(signature, WANTED) == WANTED
    assert signature.default("num_inference_steps", int) == 50
    assert signature.default("guidance_scale", float) == 7.5
    assert signature.default("height", int) is None


def test_what_is_not_taken_is_left_out_and_what_belongs_to_it_too() -> None:
    signature = read_signature(Older)
    assert signature.names == {"prompt", "strictness", "fast"}
    assert accepted_arguments(signature, WANTED) == {"prompt": "heart"}


def test_the_callback_goes_with_its_inputs() -> None:
    signature = CallSignature(frozenset({"prompt", "callback_on_step_end_tensor_inputs"}))
    assert accepted_arguments(signature, WANTED) == {"prompt": "heart"}


def test_a_pipeline_that_takes_any_name_is_given_what_it_names() -> None:
    """It would leave the rest lying, so that nobody were told that it is not heard."""
    assert accepted_arguments(read_signature(Open), WANTED) == {"prompt": "heart"}


@pytest.mark.parametrize(
    "pipeline_class", [PNDMPipeline, LDMPipeline, ScoreSdeVePipeline, KarrasVePipeline]
)
def test_a_pipeline_that_takes_any_name_but_no_prompt_takes_none(pipeline_class: type) -> None:
    signature = read_signature(pipeline_class)
    check_is_served(pipeline_class, signature)
    (done,) = pipeline_tasks(pipeline_class.__name__, signature)
    assert (done.task, done.inputs) == (Task.UNCONDITIONAL, {})


class PassingOn(Older):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        super().__call__(*args, **kwargs)


def test_a_call_that_passes_everything_on_takes_what_the_next_one_takes() -> None:
    assert read_signature(PassingOn) == read_signature(Older)


def test_wanted_arguments_are_left_as_they_are() -> None:
    wanted = dict(WANTED)
    accepted_arguments(read_signature(Older), wanted)
    assert wanted == WANTED


@pytest.mark.parametrize(
    ("pipeline_class", "needed"),
    [
        (FluxPipeline, {"prompt"}),
        # It can start from nothing, as its annotation says.
        (FluxKontextPipeline, {"prompt"}),
        (FluxImg2ImgPipeline, {"prompt", "image"}),
        (DiTPipeline, {"class_labels"}),
        (Older, {"prompt", "strictness"}),
    ],
)
def test_needed_arguments(pipeline_class: type, needed: set[str]) -> None:
    assert read_signature(pipeline_class).needed == needed


def test_defaults_of_another_kind_are_none() -> None:
    signature = read_signature(Older)
    assert signature.default("fast", int) is None
    assert signature.default("prompt", str) is None
    assert signature.default("no_such", int) is None
