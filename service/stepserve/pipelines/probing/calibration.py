"""Measuring the magnitudes that MagCache decides by, with a few plain requests of a model.

The magnitude of a denoiser call is the mean absolute size of its residual: its output less what it
was given, or the output alone where the two differ in shape. https://arxiv.org/abs/2506.09045
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from stepserve import __version__
from stepserve.domain.errors import StepserveError
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Role
from stepserve.engine.tracks.interception import parameter_names
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.parking import parkable_methods
from stepserve.pipelines.probing.probe_requests import run_probe, with_required_inputs
from stepserve.pipelines.requests.call import denoiser_calls
from stepserve.pipelines.step_cache.magnitudes import LEAST_CALLS, Calibration

PROMPTS = (
    "a red heart",
    "a smiling cat",
    "a house by a lake, oil painting",
    "portrait photo of an old man",
)
"""Unlike one another, as magnitudes are to be those of any prompt."""

OnMeasured = Callable[[GenerationRequest], None]


class CalibrationError(StepserveError):
    """The magnitudes of a model cannot be measured."""


def measure_magnitudes(
    model: LoadedModel,
    prompts: Sequence[str] = PROMPTS,
    steps: int | None = None,
    on_measured: OnMeasured = lambda request: None,
) -> Calibration:
    """Draw an image of each prompt, and look at every call of the denoiser.

    Args:
        model: with the guidance that it was seen to take.
        prompts: at least one; models without prompts draw as many images.
        steps: of each image; None for the model's default.
        on_measured: is told of each request that is done.

    Raises:
        CalibrationError: its calls are not as many at each step, or give no numbers.
        InvalidRequestError: its scheduler cannot do so many steps.
    """
    requests = [_request(model, index, prompt, steps) for index, prompt in enumerate(prompts)]
    measured = []
    for request in requests:
        measured.append(_sizes_of(model, request))
        on_measured(request)
    return Calibration(
        magnitudes=_mean_course(measured),
        scheduler=requests[0].scheduler,
        num_inference_steps=requests[0].num_inference_steps,
        guidance_scale=requests[0].guidance_scale,
        size=requests[0].size,
        prompts=len(requests),
        stepserve=__version__,
    )


def _request(model: LoadedModel, index: int, prompt: str, steps: int | None) -> GenerationRequest:
    usual = model.capabilities.usual_request(f"calibration-{index}")
    task = model.factory.tasks[usual.task]
    # There are required inputs for two requests, which differ in their class.
    request = with_required_inputs(replace(usual, seed=index), task, index % 2)
    return replace(
        request,
        prompt=task.prompt.format(prompt) if Role.PROMPT in task.inputs else "",
        num_inference_steps=request.num_inference_steps if steps is None else steps,
    )


def _sizes_of(model: LoadedModel, request: GenerationRequest) -> list[float]:
    """The mean absolute size of the residual at each step of a request."""
    timesteps = denoiser_calls(model, request)
    calls = model.capabilities.guidance.step_of(request).calls
    with torch.no_grad(), _residual_sizes(model.pipeline) as seen:
        run_probe(model, request)
    if len(seen) != timesteps * calls or timesteps < LEAST_CALLS:
        raise CalibrationError(
            f"model {model.capabilities.id}: {len(seen)} denoiser calls in {timesteps} steps, "
            f"{calls} a step were expected in at least {LEAST_CALLS}: it cannot be calibrated"
        )
    by_step = torch.stack(seen).double().reshape(timesteps, calls).mean(dim=1)
    sizes: list[float] = by_step.tolist()
    if not all(0 < size < math.inf for size in sizes):
        raise CalibrationError(
            f"model {model.capabilities.id}: the denoiser's numbers are 0 or infinite"
        )
    return sizes


@contextmanager
def _residual_sizes(pipeline: Any) -> Iterator[list[Tensor]]:
    """The size of the residual of each denoiser call until the end of the block, in order."""
    sizes: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs[parameter_names(module.forward)[0]]
        sizes.append(_residual_size(_tensors(given), _tensors(_first(output))))

    with ExitStack() as hooks:
        for _, module, rule in parkable_methods(pipeline):
            if rule.stage == Stage.DENOISE:
                hooks.enter_context(module.register_forward_hook(see, with_kwargs=True))
        yield sizes


def _first(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def _tensors(value: Any) -> list[Tensor]:
    """Some take and give a list with one entry a row."""
    return [value] if isinstance(value, Tensor) else list(value)


def _residual_size(given: list[Tensor], made: list[Tensor]) -> Tensor:
    fits = [tensor.shape for tensor in given] == [tensor.shape for tensor in made]
    residuals = [m.float() - g.float() for m, g in zip(made, given, strict=True)] if fits else made
    return torch.stack([residual.float().abs().mean() for residual in residuals]).mean()


def _mean_course(measured: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """How magnitudes go from call to call, in the mean over requests; from 1 on."""
    ratios = [[after / before for before, after in pairwise(sizes)] for sizes in measured]
    means = [sum(at_call) / len(at_call) for at_call in zip(*ratios, strict=True)]
    return tuple(round(magnitude, 6) for magnitude in accumulate(means, mul, initial=1.0))
