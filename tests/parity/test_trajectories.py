"""Trajectories: the latents of a served request are those that plain diffusers steps through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import safetensors.torch
import torch
from parity_cases import ForwardCounter, serve_staggered, submit_for_files
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest, TrajectoryFormat, TrajectoryRequest
from stepserve.pipelines.serving.runner import PipelineRunner
from task_cases import TASKS, plain_arguments, plain_pipeline, request_for

Serve = Callable[..., tuple[PipelineRunner, ForwardCounter]]
Reference = Callable[[str], Any]

TENSORS = TrajectoryRequest(TrajectoryFormat.SAFETENSORS)
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)


@dataclass
class PlainSteps:
    """What diffusers' own callback is given, step by step."""

    latents: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, pipeline: Any, index: int, timestep: torch.Tensor, values: dict[str, Any]
    ) -> dict[str, Any]:
        self.latents.append(values["latents"].clone())
        self.timesteps.append(timestep.clone())
        return {}


def tensors_of(finished: Finished, index: int) -> dict[str, torch.Tensor]:
    trajectory = finished.images[index].trajectory
    assert trajectory is not None
    return safetensors.torch.load(trajectory.tensors)


def requests_with_trajectories() -> list[GenerationRequest]:
    pairs = [(scheduler, task) for scheduler in SCHEDULERS for task in TASKS]
    return [
        request_for(task, index, scheduler, trajectory=TENSORS)
        for index, (scheduler, task) in enumerate(pairs)
    ]


def test_latents_of_requests_that_share_forwards_are_those_of_a_plain_callback(
    serve: Serve, reference: Reference, batch_invariant: bool
):
    if not batch_invariant:
        pytest.skip("this CPU gives a row other bits in other batches")
    requests = requests_with_trajectories()
    runner, forwards = serve("bfloat16")
    finished = serve_staggered(runner, requests, submit_for_files)

    assert max(forwards.rows) > 2
    for request, answer in zip(requests, finished, strict=True):
        plain = PlainSteps()
        pipeline = plain_pipeline(reference("bfloat16"), request)
        pipeline(**plain_arguments(request), callback_on_step_end=plain)
        for index in range(request.n):
            tensors = tensors_of(answer, index)
            made = torch.stack([latents[index] for latents in plain.latents])
            after = torch.cat([tensors["x_t"][1:], tensors["latents"][None]])
            assert after.dtype == made.dtype
            assert torch.equal(after, made), (request.id, request.scheduler, index)
            assert torch.equal(tensors["timesteps"], torch.stack(plain.timesteps)), request.id
            assert tensors["steps"].tolist() == [i + 1 for i in range(len(plain.latents))]
            assert tensors["x_0"].shape == tensors["x_t"].shape
