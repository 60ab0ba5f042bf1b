from __future__ import annotations

import contextlib
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.schedulers import usable as schedulers
from stepserve.pipelines.schedulers.probes import set_steps
from stepserve.pipelines.schedulers.usable import (
    SEEDLESS,
    UNSUITABLE,
    Configured,
    unusable_schedulers,
    usable_schedulers,
)
from tiny_model import default_scheduler


def compatible() -> list[str]:
    return sorted({cls.__name__ for cls in default_scheduler().compatibles})


def test_every_compatible_scheduler_is_usable_or_named_with_a_reason() -> None:
    usable = set(usable_schedulers(default_scheduler()))
    assert set(compatible()) == usable | (set(UNSUITABLE) & set(compatible()))
    assert not usable & set(UNSUITABLE)
    assert len(usable) >= 13


def test_all_others_of_diffusers_are_told_from_names_that_nobody_has() -> None:
    usable = usable_schedulers(default_scheduler())
    unusable = unusable_schedulers(usable)
    assert {"LCMScheduler", "FlowMatchEulerDiscreteScheduler"} <= set(unusable)
    assert not set(unusable) & set(usable)
    assert all(hasattr(diffusers, name) for name in unusable)


def test_unsuitable_ones_have_a_reason_and_exist() -> None:
    for name, reason in UNSUITABLE.items():
        assert hasattr(diffusers, name), name
        assert len(reason) > 20


def works(cls: type, config: Any) -> bool:
    return schedulers._works(schedulers.Configured.of(cls, config))


def test_edm_schedulers_are_left_out_although_they_run() -> None:
    """They scale the latents and count time in their own way: with this model, garbage."""
    assert "EDMEulerScheduler" in compatible()
    assert works(diffusers.EDMEulerScheduler, default_scheduler().config)
    assert "EDMEulerScheduler" not in usable_schedulers(default_scheduler())


def test_names_are_sorted_and_hold_the_models_own() -> None:
    names = list(usable_schedulers(default_scheduler()))
    assert names == sorted(names)
    assert "DDIMScheduler" in names


def test_a_scheduler_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(EulerDiscreteScheduler, "set_timesteps", refuse)
    # Settings of its own: what is known of others stays as it is.
    own = diffusers.DDIMScheduler.from_config(default_scheduler().config, beta_end=0.021)
    assert "EulerDiscreteScheduler" not in usable_schedulers(own)


@pytest.mark.parametrize("name", sorted(usable_schedulers(default_scheduler())))
def test_each_request_gets_an_instance_of_its_own(tiny: LoadedModel, name: str) -> None:
    one, other = tiny.factory.copy(name), tiny.factory.copy(name)
    assert type(one.scheduler).__name__ == name
    assert one.scheduler is not other.scheduler
    assert one.scheduler is not tiny.pipeline.scheduler
    assert one.unet is other.unet is tiny.pipeline.unet
    one.scheduler.set_timesteps(7)
    other.scheduler.set_timesteps(4)
    assert len(one.scheduler.timesteps) > len(other.scheduler.timesteps)


def test_copying_changes_nothing_about_the_resident_pipeline(tiny: LoadedModel) -> None:
    before, config = tiny.pipeline.scheduler, dict(tiny.pipeline.config)
    tiny.factory.copy("EulerDiscreteScheduler")
    assert tiny.pipeline.scheduler is before
    assert dict(tiny.pipeline.config) == config


@pytest.mark.parametrize("name", sorted(usable_schedulers(default_scheduler())))
def test_settings_and_noise_schedule_are_the_models(name: str) -> None:
    own = default_scheduler()
    cls = usable_schedulers(own)[name]
    scheduler = Configured.of(cls, own.config).build()
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.betas, own.betas)
    assert not scheduler.config.get("clip_sample", False)


def every_scheduler() -> list[Any]:
    """One of each class of diffusers that can be made without arguments."""
    found = (getattr(diffusers, name, None) for name in dir(diffusers) if "Scheduler" in name)
    made = []
    for cls in found:
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
            # This runs while tests are collected, where the suite's filters do not hold yet.
            with contextlib.suppress(TypeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.append(cls())
    return made


@pytest.mark.parametrize("scheduler", every_scheduler(), ids=lambda made: type(made).__name__)
def test_any_scheduler_gives_a_table_with_itself(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a model's own scheduler wants to be told, it does not stop the model loading."""
    # What else is usable is not asked here: trying them all takes long.
    monkeypatch.setattr(schedulers, "_works", lambda scheduler: False)
    name = type(scheduler).__name__
    assert list(usable_schedulers(scheduler)) == [name] * (name not in SEEDLESS)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
    ],
    ids=["shifting", "flow", "heun"],
)
def test_flow_matching_schedulers_pass_the_trial(scheduler: Any) -> None:
    assert works(type(scheduler), scheduler.config)
    assert type(scheduler).__name__ in usable_schedulers(scheduler)
    set_steps(scheduler, 5)
    assert scheduler.num_inference_steps == 5 or len(scheduler.timesteps) >= 5


def test_a_multistep_solver_made_for_flow_matching_is_given_only_those_that_know_it() -> None:
    """As Sana has it: others would take the model's answer for noise."""
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    usable = usable_schedulers(flow)
    assert "DPMSolverMultistepScheduler" in usable
    assert not {"DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"} & set(usable)


def test_a_distilled_model_keeps_its_own_scheduler() -> None:
    assert "LCMScheduler" in usable_schedulers(diffusers.LCMScheduler())
