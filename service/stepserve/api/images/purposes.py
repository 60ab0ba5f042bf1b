"""Which tasks the requests to a URL may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stepserve.domain.checks.input_limits import check_counts
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.tasks import Role, Task, fitting_task

GENERATED, EDITED = "POST /v1/images/generations", "POST /v1/images/edits"
WAYS: Mapping[Task, str] = MappingProxyType(
    {
        Task.TEXT_TO_IMAGE: f"{GENERATED} with a prompt",
        Task.CLASS_TO_IMAGE: f"{GENERATED} with a class_label",
        Task.UNCONDITIONAL: f"{GENERATED} without a prompt",
        Task.IMAGE_TO_IMAGE: f"{EDITED} with an image",
        Task.INPAINTING: f"{EDITED} with an image and a mask",
        Task.EDIT: f"{EDITED} with a prompt and an image",
        Task.UPSCALING: "POST /v1/images/upscale with an image",
    }
)
"""How each task is asked for: callers know URLs, not tasks."""


@dataclass(frozen=True)
class Purpose:
    """What the requests to one URL may ask for.

    Args:
        does: what they want a model to do.
        tasks: the first of them that a model offers and that fits what was sent is done.
        event_prefix: begins the names of streamed events.
    """

    does: str
    tasks: tuple[Task, ...]
    event_prefix: str

    def task_for(
        self, model: ModelCapabilities, given: Mapping[Role, int], several_prompts: bool = False
    ) -> Task:
        """The task that a request asks for which brings so many inputs of each role.

        Args:
            model: that is asked.
            given: how many inputs of each role there are.
            several_prompts: whether its prompts came as `prompts`.

        Raises:
            InvalidRequestError: the model does none of the tasks, or takes fewer inputs or more.
        """
        task = fitting_task(self.tasks, model.tasks, given)
        if task is None:
            ways = ", or ".join(WAYS[task] for task in model.tasks)
            message = f"model {model.id!r} does not {self.does}: it takes {ways}"
            raise InvalidRequestError(message, "model")
        if several_prompts and Role.PROMPT not in model.inputs_of(task):
            message = f"prompts must be left out: model {model.id!r} takes no prompt"
            raise InvalidRequestError(message, "prompts")
        check_counts(task, model, given)
        return task


GENERATIONS = Purpose(
    "make images from nothing",
    (Task.TEXT_TO_IMAGE, Task.CLASS_TO_IMAGE, Task.UNCONDITIONAL),
    "image_generation",
)
EDITS = Purpose("edit images", (Task.EDIT, Task.IMAGE_TO_IMAGE, Task.INPAINTING), "image_edit")
VARIATIONS = Purpose("vary images", (Task.IMAGE_TO_IMAGE,), "image_variation")
UPSCALES = Purpose("enlarge images", (Task.UPSCALING,), "image_upscale")
