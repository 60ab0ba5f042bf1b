"""Magnitudes, measured on tiny models, against the same by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.calibration import (
    CalibrationError,
    _residual_size,
    measure_magnitudes,
)
from torch import Tensor

STEPS = 6
PROMPTS = ("a red heart", "a blue house", "a cat")


def sizes_by_hand(tiny: LoadedModel, prompt: str, seed: int) -> list[float]:
    """The mean absolute size of every residual of a plain diffusers call."""
    sizes: list[float] = []

    def see(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        sizes.append((output[0] - args[0]).abs().mean().item())

    with tiny.pipeline.unet.register_forward_hook(see):
        tiny.pipeline(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=tiny.capabilities.default_guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    assert len(sizes) == STEPS
    return sizes


def test_magnitudes_are_those_of_plain_calls(tiny: LoadedModel) -> None:
    told: list[GenerationRequest] = []
    measured = measure_magnitudes(tiny, PROMPTS, STEPS, told.append)

    by_hand = [sizes_by_hand(tiny, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    assert measured.magnitudes[0] == 1
    for step, (before, after) in enumerate(pairwise(measured.magnitudes), 1):
        ratios = [sizes[step] / sizes[step - 1] for sizes in by_hand]
        assert after / before == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert [request.prompt for request in told] == list(PROMPTS)
    assert (measured.scheduler, measured.num_inference_steps) == ("DDIMScheduler", STEPS)
    assert (measured.prompts, measured.size) == (3, "64x64")


def test_the_usual_steps_are_measured(tiny: LoadedModel) -> None:
    capabilities = replace(tiny.capabilities, default_num_inference_steps=4)
    measured = measure_magnitudes(replace(tiny, capabilities=capabilities), ["a cat"])
    assert len(measured.magnitudes) == measured.num_inference_steps == 4


def test_nothing_of_it_stays_on_the_model(tiny: LoadedModel) -> None:
    hooks = len(tiny.pipeline.unet._forward_hooks)
    measure_magnitudes(tiny, ["a cat"], 2)
    assert len(tiny.pipeline.unet._forward_hooks) == hooks


def test_a_model_of_other_calls_than_were_seen_is_refused(
    tiny: LoadedModel, twice: Callable[[LoadedModel], LoadedModel]
) -> None:
    with pytest.raises(CalibrationError, match="4 denoiser calls in 4 steps, 2 a step were"):
        measure_magnitudes(twice(tiny), ["a cat"], 4)


def test_one_step_has_no_course(tiny: LoadedModel) -> None:
    with pytest.raises(CalibrationError, match="1 denoiser calls in 1 steps"):
        measure_magnitudes(tiny, ["a cat"], 1)


@pytest.fixture
def twice() -> Callable[[LoadedModel], LoadedModel]:
    """Says of a model that guidance calls its denoiser twice."""

    def say(model: LoadedModel) -> LoadedModel:
        guidance = model.capabilities.guidance
        guided = replace(guidance.guided, calls=2)
        limits = replace(model.capabilities, guidance=replace(guidance, guided=guided))
        return replace(model, capabilities=limits)

    return say


def test_outputs_of_another_shape_are_measured_by_themselves() -> None:
    given, made = torch.full((2, 9, 4, 4), 5.0), torch.full((2, 4, 4, 4), -3.0)
    assert _residual_size([given], [made]) == 3
    assert _residual_size([given], [given + 2]) == 2
    assert _residual_size([made, given], [made + 1, given - 2]) == 1.5
