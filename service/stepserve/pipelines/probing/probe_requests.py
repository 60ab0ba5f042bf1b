"""Small requests of everything that a model does, to find out how its requests may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import GenerationRequest, Task
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.sharing_check import ProbeRequest
from stepserve.pipelines.requests.call import call_pipeline
from stepserve.pipelines.requests.inputs import InputImages

PROMPTS = ("a red heart", "a blue house")
STEPS = 2


def make_probe_requests(
    model: LoadedModel, tasks: Sequence[Task] | None = None
) -> list[ProbeRequest]:
    """Two requests of each task, one with guidance and one without: calls of two and of one row.

    Args:
        model: what they are for.
        tasks: of these only; None means all that there are pipelines for.
    """
    requests = [
        probe_request(model.capabilities, task, index, model.capabilities.sizes.native)
        for task in (model.factory.tasks if tasks is None else tasks)
        for index in range(len(PROMPTS))
    ]
    return [partial(run_probe, model, request) for request in requests]


def probe_request(
    capabilities: ModelCapabilities, task: Task, index: int, side_px: int
) -> GenerationRequest:
    """A small request for a square image; the second is without guidance."""
    return replace(
        capabilities.usual_request(f"probe-{task}-{index}"),
        prompt=PROMPTS[index],
        width=side_px,
        height=side_px,
        num_inference_steps=capabilities.steps_of(capabilities.default_scheduler).nearest(STEPS),
        guidance_scale=0.0 if index else capabilities.default_guidance_scale,
        seed=index,
        task=task,
        strength=1.0,
    )


def run_probe(model: LoadedModel, request: GenerationRequest) -> Tensor:
    """Its image, of shape (1, channels, height, width)."""
    images: Tensor = call_pipeline(model, request, _images(request), output_type="pt")
    return torch.as_tensor(images)


def _images(request: GenerationRequest) -> InputImages:
    """Something to start from: a slope of greys, whose right half may be repainted."""
    slope = np.linspace(0, 255, request.width, dtype=np.uint8)
    greys = np.broadcast_to(slope, (request.height, request.width))
    return InputImages(
        image=Image.fromarray(greys).convert("RGB"),
        mask_image=Image.fromarray((greys > 127).astype(np.uint8) * 255),
    )
