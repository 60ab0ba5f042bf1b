"""Schedulers by class name: which ones a pipeline can use, and a fresh one for each request."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import diffusers

from stepserve.pipelines.schedulers.probes import can_do, draws_from_elsewhere

PROBE_STEPS = 4

# Left out because they would make a wrong image, or not the same one twice, rather than raise.
UNSUITABLE = {
    "CosineDPMSolverMultistepScheduler": "made for models that learned the cosine schedule in EDM",
    "DPMSolverSDEScheduler": "draws noise from a source of its own, not from the request's seed",
    "EDMDPMSolverMultistepScheduler": "made for models that learned EDM's scaling and time",
    "EDMEulerScheduler": "made for models that learned EDM's scaling and time",
    "LCMScheduler": "distilled models only: takes the network's answer as it is after one step",
    "TCDScheduler": "distilled models only: takes the network's answer as it is after one step",
}


# Left out even where it is the model's own, and even where what it draws with is not installed, so
# that it cannot be tried. Others of the kind are found by probing.
SEEDLESS = {"DPMSolverSDEScheduler"}


@dataclass(frozen=True)
class Configured:
    """A scheduler class with the settings of a model: what it can do depends on nothing else.

    Args:
        settings: of which those are equal that have the same bytes.
        config: the same for diffusers.
    """

    cls: type
    settings: bytes
    config: Any = field(compare=False)

    @classmethod
    def of(cls, scheduler_class: type, config: Any) -> Configured:
        """Of a scheduler's class, and a configuration that may be another's."""
        return cls(scheduler_class, pickle.dumps(dict(config)), config)

    def build(self) -> Any:
        """A new scheduler with the noise schedule of these settings."""
        return self.cls.from_config(self.config)  # type: ignore[attr-defined]


def usable_schedulers(scheduler: Any, scales_noise: bool = True) -> dict[str, type]:
    """Scheduler classes that can stand in for `scheduler`, by name, sorted; its own among them.

    Each is built from the same settings and tried on a small tensor; those that raise (because
    they do not know the prediction type, or need a package that is not installed) are left out, and
    so are those that draw noise which the request's seed does not decide. Whether the model's own
    class raises is not asked: the model was made for it.

    Args:
        scheduler: the model's own.
        scales_noise: whether the pipeline multiplies its first noise by what a scheduler wants.
            Where it does not, those that want that are left out: they would make a wrong image.
    """
    own = type(scheduler)
    config = getattr(scheduler, "config", {})
    usable = {} if _is_seedless(Configured.of(own, config)) else {own.__name__: own}
    for cls in getattr(scheduler, "compatibles", ()):
        name = cls.__name__
        if name in UNSUITABLE or name in usable:
            continue
        configured = Configured.of(cls, config)
        if _works(configured) and (scales_noise or not _wants_scaled_noise(configured)):
            usable[name] = cls
    return dict(sorted(usable.items()))


def unusable_schedulers(usable: Iterable[str]) -> tuple[str, ...]:
    """The schedulers of diffusers that are none of these, by name, sorted."""
    known = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    return tuple(sorted(known.difference(usable)))


@lru_cache(maxsize=256)
def _is_seedless(scheduler: Configured) -> bool:
    """Whether the same request would make another image each time."""
    is_known = scheduler.cls.__name__ in SEEDLESS
    return is_known or draws_from_elsewhere(scheduler.build, PROBE_STEPS)


@lru_cache(maxsize=256)
def _wants_scaled_noise(scheduler: Configured) -> bool:
    return float(getattr(scheduler.build(), "init_noise_sigma", 1.0)) != 1.0


@lru_cache(maxsize=256)
def _works(scheduler: Configured) -> bool:
    return can_do(scheduler.build, PROBE_STEPS) and not _is_seedless(scheduler)
