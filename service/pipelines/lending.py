"""A pipeline of its own for every request, made cheaply from the one that is resident."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from service.pipelines.schedulers import build_scheduler


class PipelineLender:
    """Hands out shallow copies of one pipeline: modules shared, scheduler of their own.

    What a copy needs is worked out once. Building a scheduler reads the signature of its class,
    and a pipeline looks through all modules for the device it runs on: together that takes longer
    than a denoising step of a small model, for answers that never change.
    """

    def __init__(self, pipeline: Any, schedulers: Mapping[str, type]) -> None:
        self._pipeline = pipeline
        self._schedulers = schedulers
        self._prototypes: dict[str, Any] = {}
        self._lent_class = _with_known_device(pipeline)

    def lend(self, scheduler: str | None = None) -> Any:
        """An ordinary pipeline of the same class name, with a scheduler of its own.

        Args:
            scheduler: the class by name; None for a copy of the pipeline's own.
        """
        own = self._pipeline.scheduler
        instead = {} if scheduler is None else {id(own): self.new_scheduler(scheduler)}
        lent = borrow(self._pipeline, instead)
        lent.__class__ = self._lent_class
        return lent

    def new_scheduler(self, name: str) -> Any:
        """A scheduler that no other request uses."""
        if name not in self._prototypes:
            config = self._pipeline.scheduler.config
            self._prototypes[name] = build_scheduler(self._schedulers[name], config)
        return copy_scheduler(self._prototypes[name])


def copy_scheduler(scheduler: Any, copied: dict[int, Any] | None = None) -> Any:
    """A scheduler with state of its own: all is copied but tensors and the configuration.

    No scheduler writes into its tensors (it makes new ones for each schedule), and copying them
    takes longer than the steps of a short request.

    Args:
        scheduler: the one to copy.
        copied: as in `copy.deepcopy`.
    """
    known = {} if copied is None else copied
    if id(scheduler) not in known:
        shared = [v for v in vars(scheduler).values() if isinstance(v, Tensor | FrozenDict)]
        known.update({id(value): value for value in shared})
    return copy.deepcopy(scheduler, known)


def borrow(pipeline: Any, copied: dict[int, Any] | None = None) -> Any:
    """A shallow copy of a pipeline whose schedulers nobody else steps; modules are shared.

    Pipelines inside it, such as a prior's, are borrowed too: their schedulers have state as well.

    Args:
        pipeline: the resident one.
        copied: what stands in for which scheduler, by its id; filled with the copies made.
    """
    copied = {} if copied is None else copied
    lent = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, SchedulerMixin):
            vars(lent)[name] = copy_scheduler(value, copied)
        elif isinstance(value, DiffusionPipeline):
            vars(lent)[name] = borrow(value, copied)
    return lent


def _with_known_device(pipeline: Any) -> type:
    device = pipeline._execution_device
    known = property(lambda self: device)
    return type(type(pipeline).__name__, (type(pipeline),), {"_execution_device": known})
