"""A pipeline of its own for every request, made cheaply from the one that is resident."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

from service.domain.requests import Task
from service.pipelines.blending import denoiser_for_inpainting
from service.pipelines.schedulers import build_scheduler

OTHER_TASKS = {
    Task.IMAGE_TO_IMAGE: AutoPipelineForImage2Image,
    Task.INPAINTING: AutoPipelineForInpainting,
}


class PipelineLender:
    """Hands out shallow copies of one pipeline: modules shared, scheduler of their own.

    For other tasks than the pipeline's own they are of diffusers' classes for these, over the same
    modules, so that requests of all tasks meet in the same forwards.

    What a copy needs is worked out once. Building a scheduler reads the signature of its class,
    and a pipeline looks through all modules for the device it runs on: together that takes longer
    than a denoising step of a small model, for answers that never change.
    """

    def __init__(self, pipeline: Any, schedulers: Mapping[str, type]) -> None:
        self._pipeline = pipeline
        self._schedulers = schedulers
        self._prototypes: dict[str, Any] = {}
        pipelines = {Task.TEXT_TO_IMAGE: pipeline} | _for_other_tasks(pipeline)
        self._lenders = {task: (p, _with_known_device(p)) for task, p in pipelines.items()}

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What can be done with these modules."""
        return tuple(self._lenders)

    def lend(self, scheduler: str, task: Task = Task.TEXT_TO_IMAGE) -> Any:
        """An ordinary pipeline of the task's class name, with a new scheduler of that name."""
        pipeline, lent_class = self._lenders[task]
        lent = copy.copy(pipeline)
        lent.__class__ = lent_class
        vars(lent)["scheduler"] = self.new_scheduler(scheduler)
        return lent

    def new_scheduler(self, name: str) -> Any:
        """A scheduler that no other request uses."""
        if name not in self._prototypes:
            config = self._pipeline.scheduler.config
            self._prototypes[name] = build_scheduler(self._schedulers[name], config)
        return copy.deepcopy(self._prototypes[name])


def _for_other_tasks(pipeline: Any) -> dict[Task, Any]:
    made = {}
    for task in OTHER_TASKS:
        # diffusers raises where it has no pipeline of that task for models of this kind.
        with contextlib.suppress(ValueError):
            made[task] = _for_task(pipeline, task)
    return made


def _for_task(pipeline: Any, task: Task) -> Any:
    # Constructors alter settings of the scheduler that they get, and say so: hence a copy.
    scheduler = copy.deepcopy(pipeline.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other = OTHER_TASKS[task].from_pipe(pipeline, scheduler=scheduler)
    if task is Task.INPAINTING and hasattr(other, "unet"):
        vars(other)["unet"] = denoiser_for_inpainting(other)
    other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return other


def _with_known_device(pipeline: Any) -> type:
    device = pipeline._execution_device
    known = property(lambda self: device)
    return type(type(pipeline).__name__, (type(pipeline),), {"_execution_device": known})
