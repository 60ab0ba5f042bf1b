"""Schedulers by class name: which ones a pipeline can use, and a fresh one for each request."""

from __future__ import annotations

import warnings
from typing import Any

import torch

PROBE_STEPS = 4

# Left out because they would make a wrong picture, or not the same one twice, rather than raise.
UNSUITABLE = {
    "CosineDPMSolverMultistepScheduler": "made for models that learned the cosine schedule in EDM",
    "DPMSolverSDEScheduler": "draws noise from a source of its own, not from the request's seed",
    "EDMDPMSolverMultistepScheduler": "made for models that learned EDM's scaling and time",
    "EDMEulerScheduler": "made for models that learned EDM's scaling and time",
    "LCMScheduler": "distilled models only: takes the network's answer as it is after one step",
    "TCDScheduler": "distilled models only: takes the network's answer as it is after one step",
}


def usable_schedulers(scheduler: Any) -> dict[str, type]:
    """Scheduler classes that can stand in for `scheduler`, by name, sorted.

    Each is built from the same settings and tried on a small tensor; those that raise (because
    they do not know the prediction type, or need a package that is not installed) are left out.
    """
    candidates = {cls.__name__: cls for cls in [*scheduler.compatibles, type(scheduler)]}
    return {
        name: cls
        for name, cls in sorted(candidates.items())
        if name not in UNSUITABLE and _works(cls, scheduler.config)
    }


def build_scheduler(cls: type, config: Any) -> Any:
    """A new scheduler of class `cls` with the noise schedule of `config`."""
    return cls.from_config(config)  # type: ignore[attr-defined]


def _works(cls: type, config: Any) -> bool:
    try:
        with warnings.catch_warnings():
            # A warning is no reason to leave it out, even where warnings are errors.
            warnings.simplefilter("ignore")
            return _makes_finite_samples(build_scheduler(cls, config))
    except Exception:
        return False


def _makes_finite_samples(scheduler: Any) -> bool:
    scheduler.set_timesteps(PROBE_STEPS)
    sample = torch.zeros(1, 1, 2, 2)
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(model_input, timestep, sample, return_dict=False)[0]
    return bool(torch.isfinite(sample).all())
