"""One text-to-image request as an ordinary call of an ordinary diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from service.domain.errors import GenerationFailedError, InvalidRequestError
from service.domain.requests import GenerationRequest
from service.pipelines.load import LoadedModel

OnStep = Callable[[int, int], None]


def make_generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the same seed gives the same noise on every device."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(n)]


def text_to_image(
    model: LoadedModel, request: GenerationRequest, on_step: OnStep | None = None
) -> list[Image.Image]:
    """Make the pictures of a request. `on_step(i, n)` is called after each scheduler step.

    Raises:
        GenerationFailedError: the denoiser's numbers overflowed.
    """

    def step_ended(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        if on_step is not None:
            on_step(index + 1, pipeline.num_timesteps)
        if index + 1 == pipeline.num_timesteps:
            _check_finite(values["latents"], request)
        return {}

    pipeline = model.lender.lend(request.scheduler)
    images: list[Image.Image] = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.n,
        generator=make_generators(request.seed, request.n),
        callback_on_step_end=step_ended,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images
    return images


def denoiser_calls(model: LoadedModel, request: GenerationRequest) -> int:
    """How often the denoiser will be called: some schedulers call it more than once a step.

    Raises:
        InvalidRequestError: the scheduler cannot do that number of steps.
    """
    wanted = request.scheduler, request.num_inference_steps
    if wanted not in model.denoiser_calls:
        model.denoiser_calls[wanted] = _count_timesteps(model, *wanted)
    return model.denoiser_calls[wanted]


def _count_timesteps(model: LoadedModel, name: str, steps: int) -> int:
    scheduler = model.lender.new_scheduler(name)
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:
        # Such as PNDM, which begins with four steps of a higher order.
        raise InvalidRequestError(
            f"num_inference_steps {steps} cannot be done by {name}", "num_inference_steps"
        ) from error
    return len(scheduler.timesteps)


def _check_finite(latents: torch.Tensor, request: GenerationRequest) -> None:
    """A picture of numbers that are none would be black, and look like an answer."""
    if not bool(torch.isfinite(latents).all()):
        raise GenerationFailedError(
            f"request {request.id} failed: the denoiser's output is not finite "
            f"(scheduler {request.scheduler}, guidance_scale {request.guidance_scale:g})"
        )
