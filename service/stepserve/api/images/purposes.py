"""Which tasks the requests to a URL may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepserve.domain.checks.input_limits import check_counts
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.tasks import Role, Task, fitting_task


@dataclass(frozen=True)
class Purpose:
    """What the requests to one URL may ask for.

    Args:
        tasks: the first of them that a model offers and that fits what was sent is done.
        event_prefix: begins the names of streamed events.
    """

    tasks: tuple[Task, ...]
    event_prefix: str

    def task_for(self, model: ModelCapabilities, given: Mapping[Role, int]) -> Task:
        """The task that a request asks for which brings so many inputs of each role.

        Raises:
            InvalidRequestError: the model does none of the tasks, or takes fewer inputs or more.
        """
        task = fitting_task(self.tasks, model.tasks, given) or self.tasks[0]
        check_counts(task, model, given)
        return task


GENERATIONS = Purpose(
    (Task.TEXT_TO_IMAGE, Task.CLASS_TO_IMAGE, Task.UNCONDITIONAL), "image_generation"
)
EDITS = Purpose((Task.EDIT, Task.IMAGE_TO_IMAGE, Task.INPAINTING), "image_edit")
VARIATIONS = Purpose((Task.IMAGE_TO_IMAGE,), "image_variation")
UPSCALES = Purpose((Task.UPSCALING,), "image_upscale")
