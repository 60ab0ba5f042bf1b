"""Small requests of everything that a model does, to find out how its requests may share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepserve.domain.requests import ControlUse, GenerationRequest, ReferenceUse
from stepserve.domain.tasks import Role, Task
from stepserve.pipelines.facts.pipeline_tasks import PipelineTask
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.sharing_check import ProbeRequest
from stepserve.pipelines.requests.call import call_pipeline
from stepserve.pipelines.requests.inputs import decode_inputs

PROMPTS = ("a red heart", "a blue house")
STEPS = 2
LEAST_PX = 64
"""Of an image that a request brings along: some pipelines look at no smaller ones."""

CONTROL = "control"
"""What the control image is called that a pipeline needs by itself."""


def make_probe_requests(
    model: LoadedModel, tasks: Iterable[Task] | None = None
) -> list[ProbeRequest]:
    """Two requests of each task, one with guidance and one without: calls of two and of one row.

    Where the model has IP-Adapters, the first has a reference image for each.

    Args:
        model: what they are for.
        tasks: of these only; None means all that there are pipelines for.
    """
    requests = [
        _with_references(model, probe_request(model, task, index, model.capabilities.sizes.native))
        for task in (model.factory.tasks if tasks is None else tasks)
        for index in range(len(PROMPTS))
    ]
    return [partial(run_probe, model, request) for request in requests]


def probe_request(model: LoadedModel, task: Task, index: int, side_px: int) -> GenerationRequest:
    """A small request for a square image; the second is without guidance."""
    capabilities = model.capabilities
    request = replace(
        capabilities.usual_request(f"probe-{task}-{index}", task),
        width=side_px,
        height=side_px,
        num_inference_steps=capabilities.steps_of(capabilities.default_scheduler).nearest(STEPS),
        guidance_scale=0.0 if index else capabilities.default_guidance_scale,
        seed=index,
    )
    if request.strength is not None:
        request = replace(request, strength=1.0)
    return with_required_inputs(request, model.factory.tasks[task], index)


def with_required_inputs(
    request: GenerationRequest, task: PipelineTask, index: int = 0
) -> GenerationRequest:
    """The request with what its task cannot do without: a prompt, a class, images.

    Args:
        request: without any input.
        task: what its pipeline makes of it.
        index: which of two prompts and classes.
    """
    least = {role: count.least for role, count in task.inputs.items()}
    file = _slope(max(request.width, LEAST_PX), max(request.height, LEAST_PX))
    return replace(
        request,
        prompt=task.prompt.format(PROMPTS[index]) if Role.PROMPT in task.inputs else "",
        class_label=index if least.get(Role.CLASS_LABEL) else None,
        images=(file("RGB"),) * least.get(Role.IMAGE, 0),
        mask=file("L") if least.get(Role.MASK) else None,
        controls=(ControlUse(CONTROL, file("RGB")),) * least.get(Role.CONTROL, 0),
    )


def _with_references(model: LoadedModel, request: GenerationRequest) -> GenerationRequest:
    if request.seed or Role.REFERENCE not in model.capabilities.inputs_of(request.task):
        return request
    file = _slope(request.width, request.height)("RGB")
    uses = (ReferenceUse(file, adapter=name) for name in model.capabilities.ip_adapters)
    return replace(request, references=tuple(uses))


def run_probe(model: LoadedModel, request: GenerationRequest) -> Tensor:
    """Its image, of shape (1, channels, height, width)."""
    task, factor = model.factory.tasks[request.task], model.capabilities.upscale_factor
    inputs = decode_inputs(request, task.is_fitted, factor)
    images = call_pipeline(model, request, inputs, output_type="pt")
    if isinstance(images, np.ndarray):
        # Some make arrays of them whatever is asked for, with the channels last.
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.as_tensor(images)


def _slope(width_px: int, height_px: int) -> Callable[[str], bytes]:
    """Files of a mode: a slope of greys, or a mask whose right half may be repainted."""

    def file(mode: str) -> bytes:
        slope = np.linspace(0, 255, width_px, dtype=np.uint8)
        greys = np.broadcast_to(slope, (height_px, width_px))
        pixels = (greys > 127).astype(np.uint8) * 255 if mode == "L" else greys
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
        return buffer.getvalue()

    return file
