"""What schedulers can do is tried, without a network, and told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.models import StepRange
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.schedulers.probes import (
    ScheduleError,
    can_do,
    draws_from_elsewhere,
    find_steps,
    set_steps,
    try_all,
    try_ends,
)
from stepserve.pipelines.schedulers.usable import Configured, usable_schedulers
from tiny_model import STABLE_DIFFUSION, save_tiny_model

# Of which seven cannot do a thousand steps with these settings.
FEWER = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}


def maker(cls: type, config: Any = STABLE_DIFFUSION.config) -> Callable[[], Any]:
    return Configured.of(cls, config).build


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("sd"), STABLE_DIFFUSION)
    return load_model("sd", folder, dtype="float32", device="cpu")


def test_limits_are_those_of_each_scheduler(stable_diffusion: LoadedModel) -> None:
    told = stable_diffusion.capabilities
    assert {n for n in told.schedulers if told.steps_of(n).maximum < 1000} >= FEWER
    assert (told.min_num_inference_steps, told.max_num_inference_steps) == (1, 999)
    # Only what differs from the default scheduler's is listed.
    assert told.default_scheduler not in told.scheduler_steps
    assert told.scheduler_steps["EulerDiscreteScheduler"] == StepRange(1, 1000)


@pytest.mark.parametrize(
    "steps", [1, 2, 3, 4, 7, 50, pytest.param(501, marks=pytest.mark.slow), 999]
)
def test_both_ends_decide_as_all_steps_do(steps: int) -> None:
    for name, cls in usable_schedulers(STABLE_DIFFUSION).items():
        if steps > 7 and name == "LMSDiscreteScheduler":
            continue  # A thousand steps of it take seconds.
        assert can_do(maker(cls), steps) is tried(try_all, cls, steps), name


def tried(trial: Callable[[Callable[[], Any], int], None], cls: type, steps: int) -> bool:
    try:
        trial(maker(cls), steps)
    except ScheduleError:
        return False
    return True


def test_where_the_noise_stands_still_in_the_middle_multistep_solvers_divide_by_nothing() -> None:
    with pytest.raises(ScheduleError, match="its numbers are not finite at step 501"):
        try_ends(maker(DEISMultistepScheduler), 1000)
    # Who begins behind that place does not come through it.
    try_ends(maker(DEISMultistepScheduler), 1000, done=600)


def test_what_a_scheduler_raises_is_told() -> None:
    with pytest.raises(ScheduleError, match="IndexError: index 1000 is out of bounds"):
        try_ends(maker(DDIMScheduler), 1000)


def test_a_distilled_scheduler_has_no_more_steps_than_it_was_distilled_from() -> None:
    make = maker(LCMScheduler, LCMScheduler().config)
    assert find_steps(partial(can_do, make), 1000, (2, 4)) == StepRange(1, 50)


@given(low=st.integers(1, 40), width=st.integers(0, 900), known=st.integers(1, 1000))
def test_the_range_around_a_known_count_is_found(low: int, width: int, known: int) -> None:
    found = find_steps(lambda steps: low <= steps <= low + width, 1000, (known, low + width // 2))
    assert found == StepRange(low, min(low + width, 1000))


def test_where_no_count_works_none_is_refused() -> None:
    assert find_steps(lambda steps: False, 1000, (4, 2, 1)) == StepRange(1, 1000)


class Seedless(DDIMScheduler):
    """Draws noise that nobody's seed decides."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        (sample,) = super().step(*args, **kwargs)[:1]
        return (sample + torch.randn(sample.shape),)


class Drawing(DDIMScheduler):
    """Takes numbers that it makes no use of from the source that all requests share."""

    @functools.wraps(DDIMScheduler.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return super().step(*args, **kwargs)


class Private(DDIMScheduler):
    """Draws from a source of its own, which begins elsewhere each time."""

    begun = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        Private.begun += 1
        own = torch.Generator().manual_seed(Private.begun)
        (sample,) = super().step(*args, **kwargs)[:1]
        return (sample + torch.randn(sample.shape, generator=own),)


@pytest.mark.parametrize("cls", [Seedless, Drawing, Private])
def test_a_scheduler_whose_noise_no_seed_decides_is_found_and_not_offered(cls: type) -> None:
    own = cls()
    before = torch.get_rng_state()
    assert draws_from_elsewhere(maker(cls, own.config), 4)
    assert cls.__name__ not in usable_schedulers(own)
    assert torch.equal(before, torch.get_rng_state())


def test_schedulers_that_draw_from_the_given_generator_are_offered() -> None:
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert not draws_from_elsewhere(maker(type(stochastic), stochastic.config), 4)
    assert "EulerAncestralDiscreteScheduler" in usable_schedulers(STABLE_DIFFUSION)


def test_an_operators_limit_is_kept(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, STABLE_DIFFUSION, max_num_inference_steps=60)
    told = load_model("sd", folder, dtype="float32", device="cpu").capabilities
    assert told.max_num_inference_steps == 60
    assert told.scheduler_steps == {}


def test_schedulers_that_shift_their_noise_are_told_how_far() -> None:
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    set_steps(shifting, 5)
    assert len(shifting.timesteps) == 5
