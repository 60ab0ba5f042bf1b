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


# Left out even where it is the model's own: the same request would make another picture each time.
SEEDLESS = {"DPMSolverSDEScheduler"}

# Flow-matching schedulers that shift their noise by the picture's size are told how far.
PROBE_SHIFT = 1.0


def usable_schedulers(scheduler: Any) -> dict[str, type]:
    """Scheduler classes that can stand in for `scheduler`, by name, sorted; its own among them.

    Each is built from the same settings and tried on a small tensor; those that raise (because
    they do not know the prediction type, or need a package that is not installed) are left out.
    The model's own class is not tried: the model was made for it.
    """
    own = type(scheduler)
    usable = {own.__name__: own} if own.__name__ not in SEEDLESS else {}
    for cls in getattr(scheduler, "compatibles", ()):
        name = cls.__name__
        if name not in UNSUITABLE and name not in usable and _works(cls, scheduler.config):
            usable[name] = cls
    return dict(sorted(usable.items()))


def build_scheduler(cls: type, config: Any) -> Any:
    """A new scheduler of class `cls` with the noise schedule of `config`."""
    return cls.from_config(config)  # type: ignore[attr-defined]


def set_steps(scheduler: Any, steps: int) -> None:
    """Prepare a scheduler for that many steps, whatever else its class wants to be told."""
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        scheduler.set_timesteps(steps, mu=PROBE_SHIFT)
    else:
        scheduler.set_timesteps(steps)


def _works(cls: type, config: Any) -> bool:
    try:
        with warnings.catch_warnings():
            # A warning is no reason to leave it out, even where warnings are errors.
            warnings.simplefilter("ignore")
            return _makes_finite_samples(build_scheduler(cls, config))
    except Exception:
        return False


def _makes_finite_samples(scheduler: Any) -> bool:
    set_steps(scheduler, PROBE_STEPS)
    # Flow matching has no such method, as the model's input is the sample itself.
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = torch.zeros(1, 1, 2, 2)
    for timestep in scheduler.timesteps:
        model_input = scale(sample, timestep)
        sample = scheduler.step(model_input, timestep, sample, return_dict=False)[0]
    return bool(torch.isfinite(sample).all())
