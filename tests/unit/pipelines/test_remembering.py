from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from stepserve.pipelines.copies.factory import copy_scheduler
from stepserve.pipelines.modules.third_party.memoized_schedulers import (
    memoize_numbers,
    memoizing_class,
)
from stepserve.pipelines.schedulers.usable import build_scheduler, usable_schedulers
from tiny_model import default_scheduler

USABLE = usable_schedulers(default_scheduler())
# Each more than once: the first runs fill what the later ones read.
STEP_COUNTS = (5, 8, 5, 20, 8, 20)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"prediction_type": "epsilon"},
    {"solver_order": 3, "solver_type": "bh1"},
]


def remembering(scheduler: Any) -> Any:
    other = copy_scheduler(scheduler)
    other.__class__ = memoizing_class(scheduler)
    return other


def samples(scheduler: Any, steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every sample on the way, from noise of a seed and a stand-in for a model."""
    generator = torch.Generator().manual_seed(steps)
    takes = inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if "generator" in takes else {}
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    found = []
    for timestep in scheduler.timesteps:
        answer = scheduler.scale_model_input(sample, timestep) * 0.7 + 0.1
        sample = scheduler.step(answer, timestep, sample, return_dict=False, **noise)[0]
        found.append(sample)
    return found


def build(cls: type, settings: dict[str, Any]) -> Any:
    taken = inspect.signature(cls).parameters
    config = dict(default_scheduler().config) | settings
    return build_scheduler(cls, {name: value for name, value in config.items() if name in taken})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("name", USABLE)
def test_every_step_is_the_same_in_every_bit(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = build(USABLE[name], settings)
    prototype = remembering(plain)
    for steps in STEP_COUNTS:
        expected = samples(copy.deepcopy(plain), steps, dtype)
        found = samples(copy_scheduler(prototype), steps, dtype)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        # Not by value: signs of zero and what is no number count too.
        pairs = zip(found, expected, strict=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("cls", [DEISMultistepScheduler, UniPCMultistepScheduler])
def test_copies_share_what_they_remember(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = cls._sigma_to_alpha_sigma_t  # type: ignore[attr-defined]

    def counting(self: Any, sigma: torch.Tensor) -> Any:
        asked.append(sigma)
        return original(self, sigma)

    monkeypatch.setattr(cls, "_sigma_to_alpha_sigma_t", counting)
    prototype = remembering(build(cls, {}))
    samples(copy_scheduler(prototype), 10, torch.float32)
    # Once for each sigma; that of zero, at the very end, is asked for anew.
    assert len(asked) <= 12
    before = len(asked)
    samples(copy_scheduler(prototype), 10, torch.float32)
    assert len(asked) - before <= 2


def test_other_settings_are_not_answered_from_memory() -> None:
    """As `DPMSolverSinglestepScheduler.set_timesteps` gives itself some."""
    prototype = remembering(build(DPMSolverMultistepScheduler, {}))
    sigma = torch.tensor(0.5)
    expected = prototype._sigma_to_alpha_sigma_t(sigma)
    changed = copy_scheduler(prototype)
    changed.register_to_config(use_flow_sigmas=True)
    assert changed._sigma_to_alpha_sigma_t(sigma) == (0.5, 0.5)
    assert prototype._sigma_to_alpha_sigma_t(sigma) == expected != (0.5, 0.5)


def test_names_and_signatures_stay_and_others_are_left_alone() -> None:
    assert memoizing_class(build(DDIMScheduler, {})) is DDIMScheduler
    for cls in (DEISMultistepScheduler, DPMSolverSinglestepScheduler):
        made = memoizing_class(build(cls, {}))
        assert made.__name__ == cls.__name__
        assert issubclass(made, cls)
        assert inspect.signature(made.step) == inspect.signature(cls.step)


def test_numbers_are_told_apart_by_all_that_decides_the_answer() -> None:
    calls: list[Any] = []

    def function(number: Any) -> Any:
        calls.append(number)
        return np.log(number)

    log = memoize_numbers(function)
    numbers = [torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0)]
    for number in [*numbers, *numbers]:
        assert torch.equal(log(number), np.log(number))
        assert log(number).dtype == np.log(number).dtype
    assert len(calls) == len(numbers)
    with torch.inference_mode():
        assert log(torch.tensor(2.0)).is_inference()
    assert not log(torch.tensor(2.0)).is_inference()


@pytest.mark.parametrize(
    "other", [torch.tensor([2.0]), 2.0, torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(np.nan)]
)
def test_all_else_passes_through(other: Any) -> None:
    calls = []
    function = memoize_numbers(lambda value: calls.append(value) or value)
    assert function(other) is other
    assert function(other) is other
    assert len(calls) == 2
