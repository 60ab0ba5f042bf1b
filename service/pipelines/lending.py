"""A pipeline of its own for every request, made cheaply from the one that is resident."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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
        self._lent_class = _lent_class(pipeline)

    def lend(self, scheduler: str) -> Any:
        """An ordinary pipeline of the same class name, with a new scheduler of that name."""
        lent = copy.copy(self._pipeline)
        lent.__class__ = self._lent_class
        vars(lent)["scheduler"] = self.new_scheduler(scheduler)
        return lent

    def new_scheduler(self, name: str) -> Any:
        """A scheduler that no other request uses."""
        if name not in self._prototypes:
            config = self._pipeline.scheduler.config
            self._prototypes[name] = build_scheduler(self._schedulers[name], config)
        return copy.deepcopy(self._prototypes[name])


def _lent_class(pipeline: Any) -> type:
    device = pipeline._execution_device
    answers = {
        "_execution_device": property(lambda self: device),
        # At its end a pipeline takes its offloading hooks off and puts new ones on. The modules are
        # shared, others are in the middle of theirs, and what makes calls park would go with them.
        "maybe_free_model_hooks": lambda self: None,
    }
    return type(type(pipeline).__name__, (type(pipeline),), answers)
