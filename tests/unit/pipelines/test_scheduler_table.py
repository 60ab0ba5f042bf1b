from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny_model import default_scheduler

from service.pipelines import schedulers
from service.pipelines.load import LoadedModel
from service.pipelines.schedulers import UNSUITABLE, build_scheduler, usable_schedulers


def compatible() -> list[str]:
    return sorted({cls.__name__ for cls in default_scheduler().compatibles})


def test_every_compatible_scheduler_is_usable_or_named_with_a_reason() -> None:
    usable = set(usable_schedulers(default_scheduler()))
    assert set(compatible()) == usable | (set(UNSUITABLE) & set(compatible()))
    assert not usable & set(UNSUITABLE)
    assert len(usable) >= 13


def test_unsuitable_ones_have_a_reason_and_exist() -> None:
    for name, reason in UNSUITABLE.items():
        assert hasattr(diffusers, name), name
        assert len(reason) > 20


def test_edm_schedulers_are_left_out_although_they_run() -> None:
    """They scale the latents and count time in their own way: with this model, garbage."""
    assert "EDMEulerScheduler" in compatible()
    assert schedulers._works(diffusers.EDMEulerScheduler, default_scheduler().config)
    assert "EDMEulerScheduler" not in usable_schedulers(default_scheduler())


def test_names_are_sorted_and_hold_the_models_own() -> None:
    names = list(usable_schedulers(default_scheduler()))
    assert names == sorted(names)
    assert "DDIMScheduler" in names


def test_a_scheduler_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(EulerDiscreteScheduler, "set_timesteps", refuse)
    assert "EulerDiscreteScheduler" not in usable_schedulers(default_scheduler())


@pytest.mark.parametrize("name", sorted(usable_schedulers(default_scheduler())))
def test_each_request_gets_an_instance_of_its_own(tiny: LoadedModel, name: str) -> None:
    one, other = tiny.lender.lend(name), tiny.lender.lend(name)
    assert type(one.scheduler).__name__ == name
    assert one.scheduler is not other.scheduler
    assert one.scheduler is not tiny.pipeline.scheduler
    assert one.unet is other.unet is tiny.pipeline.unet
    one.scheduler.set_timesteps(7)
    other.scheduler.set_timesteps(4)
    assert len(one.scheduler.timesteps) > len(other.scheduler.timesteps)


def test_borrowing_changes_nothing_about_the_resident_pipeline(tiny: LoadedModel) -> None:
    before, config = tiny.pipeline.scheduler, dict(tiny.pipeline.config)
    tiny.lender.lend("EulerDiscreteScheduler")
    assert tiny.pipeline.scheduler is before
    assert dict(tiny.pipeline.config) == config


@pytest.mark.parametrize("name", sorted(usable_schedulers(default_scheduler())))
def test_settings_and_noise_schedule_are_the_models(name: str) -> None:
    own = default_scheduler()
    cls = usable_schedulers(own)[name]
    scheduler = build_scheduler(cls, own.config)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.betas, own.betas)
    assert not scheduler.config.get("clip_sample", False)
