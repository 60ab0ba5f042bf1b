"""A pipeline of its own for every request, made cheaply from the one that is resident."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor

from stepserve.domain.tasks import Task
from stepserve.pipelines.copies.blending import denoiser_for_inpainting
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.facts.classes import class_count
from stepserve.pipelines.facts.pipeline_tasks import (
    WITH_MASK,
    PipelineTask,
    pipeline_tasks,
    told_classes,
)
from stepserve.pipelines.facts.signature import CallSignature, read_signature
from stepserve.pipelines.modules.perturbed_rows import perturb_by_row
from stepserve.pipelines.modules.third_party.pinned_noise import on_host
from stepserve.pipelines.modules.third_party.resident_pipelines import copy_class
from stepserve.pipelines.schedulers.usable import Configured

OTHER_TASKS = {
    Task.TEXT_TO_IMAGE: AutoPipelineForText2Image,
    Task.IMAGE_TO_IMAGE: AutoPipelineForImage2Image,
    Task.INPAINTING: AutoPipelineForInpainting,
}


class PipelineFactory:
    """Makes shallow copies of one pipeline: modules shared, scheduler of their own.

    For other tasks than the pipeline's own they are of diffusers' classes for these, over the same
    modules, so that requests of all tasks meet in the same forwards.

    What a copy needs is worked out once. Building a scheduler reads the signature of its class,
    and a pipeline looks through all modules for the device it runs on: together that takes longer
    than a denoising step of a small model, for results that never change.

    Args:
        pipeline: the resident one.
        schedulers: classes by name.
        keeps_on_host: whether timesteps stay on the CPU; see `pinned_noise`.
    """

    def __init__(
        self, pipeline: Any, schedulers: Mapping[str, type], keeps_on_host: bool = False
    ) -> None:
        self._pipeline = pipeline
        self._schedulers = schedulers
        self._keeps_on_host = keeps_on_host
        self._prototypes: dict[str, Any] = {}
        pipelines, self._tasks = _by_task(pipeline)
        self._pipelines = {task: (p, copy_class(p, keeps_on_host)) for task, p in pipelines.items()}
        self._signatures = {task: read_signature(type(p)) for task, p in pipelines.items()}

    @property
    def tasks(self) -> Mapping[Task, PipelineTask]:
        """What can be done with these modules, the pipeline's own task first."""
        return self._tasks

    def signature(self, task: Task) -> CallSignature:
        """What the pipeline of a task takes."""
        return self._signatures[task]

    def copy(self, scheduler: str | None = None, task: Task | None = None) -> Any:
        """An ordinary pipeline of the task's class name, with a scheduler of its own.

        Args:
            scheduler: the class by name; None for a copy of the pipeline's own.
            task: what it is to be used for; None for the pipeline's own.
        """
        pipeline, cls = self._pipelines[next(iter(self._tasks)) if task is None else task]
        return self._copy(pipeline, cls, scheduler)

    def copy_of(self, pipeline: Any, scheduler: str | None = None) -> Any:
        """The same of another pipeline over these modules, such as one that has a control."""
        return self._copy(pipeline, copy_class(pipeline, self._keeps_on_host), scheduler)

    def _copy(self, pipeline: Any, cls: type, scheduler: str | None) -> Any:
        own = pipeline.scheduler
        instead = {} if scheduler is None else {id(own): self.new_scheduler(scheduler)}
        copied = copy_pipeline(pipeline, instead)
        copied.__class__ = cls
        return copied

    def configured(self, name: str) -> Configured:
        """The class and the settings of a scheduler."""
        return Configured.of(self._schedulers[name], self._pipeline.scheduler.config)

    def new_scheduler(self, name: str) -> Any:
        """A scheduler that no other request uses."""
        if name not in self._prototypes:
            prototype = copy_scheduler(prototype_of(self.configured(name)))
            if self._keeps_on_host:
                prototype.__class__ = on_host(type(prototype))
            self._prototypes[name] = prototype
        return copy_scheduler(self._prototypes[name])


@lru_cache(maxsize=64)
def prototype_of(scheduler: Configured) -> Any:
    """What schedulers of one class with the same settings are copied from."""
    return scheduler.build()


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


def copy_pipeline(pipeline: Any, copied: dict[int, Any] | None = None) -> Any:
    """A shallow copy of a pipeline whose schedulers and guiders are its own; modules are shared.

    Pipelines inside it, such as a prior's, are copied too: their schedulers have state as well.

    Args:
        pipeline: the resident one.
        copied: what stands in for which scheduler, by its id; filled with the copies made.
    """
    copied = {} if copied is None else copied
    own = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, SchedulerMixin | BaseGuidance):
            vars(own)[name] = copy_scheduler(value, copied)
        elif isinstance(value, DiffusionPipeline):
            vars(own)[name] = copy_pipeline(value, copied)
    perturb_by_row(own)
    return own


def schedulers_of(pipeline: Any) -> list[Any]:
    """Every scheduler of a pipeline and of the pipelines inside it, once."""
    found: dict[int, Any] = {}
    for value in vars(pipeline).values():
        if isinstance(value, SchedulerMixin):
            found[id(value)] = value
        elif isinstance(value, DiffusionPipeline):
            found |= {id(scheduler): scheduler for scheduler in schedulers_of(value)}
    return list(found.values())


def _by_task(pipeline: Any) -> tuple[dict[Task, Any], dict[Task, PipelineTask]]:
    """By task, what does it and how: the pipeline itself, then diffusers' classes for others."""
    tasks = _tasks_of(pipeline)
    pipelines = dict.fromkeys(tasks, pipeline)
    for task in OTHER_TASKS:
        # diffusers raises where it has no pipeline of that task for models of this kind.
        with contextlib.suppress(ValueError):
            if task not in pipelines:
                other = _for_task(pipeline, task)
                # FLUX.2's own class is listed for images, which it edits by instruction.
                if (done := _tasks_of(other).get(task)) is not None:
                    tasks[task], pipelines[task] = done, other
    return pipelines, tasks


def _tasks_of(pipeline: Any) -> dict[Task, PipelineTask]:
    done = pipeline_tasks(type(pipeline).__name__, read_signature(type(pipeline)))
    count = class_count(denoiser_of(pipeline))
    return {one.task: one for one in (told_classes(each, count) for each in done)}


def _class_for(pipeline: Any, task: Task) -> Any:
    """What makes a pipeline of another task of this one."""
    name = WITH_MASK.get(type(pipeline).__name__) if task is Task.INPAINTING else None
    return OTHER_TASKS[task] if name is None else getattr(diffusers, name)


def _for_task(pipeline: Any, task: Task) -> Any:
    # Constructors alter settings of the scheduler that they get, and say so: hence a copy.
    scheduler = copy.deepcopy(pipeline.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other = _class_for(pipeline, task).from_pipe(pipeline, scheduler=scheduler)
    # Pipelines that work on pixels blend pixels.
    if task is Task.INPAINTING and hasattr(other, "unet") and hasattr(other, "vae"):
        vars(other)["unet"] = denoiser_for_inpainting(other)
    other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return other
