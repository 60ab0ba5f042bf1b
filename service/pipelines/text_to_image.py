"""One text-to-image request as an ordinary call of an ordinary diffusers pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from service.domain.errors import InvalidRequestError
from service.domain.requests import GenerationRequest
from service.pipelines.load import LoadedModel
from service.pipelines.schedulers import build_scheduler

OnStep = Callable[[int, int], None]


def borrow_pipeline(model: LoadedModel, scheduler: str) -> Any:
    """A shallow copy that shares all modules and has a scheduler of its own."""
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = build_scheduler(
        model.schedulers[scheduler], model.pipeline.scheduler.config
    )
    return pipeline


def make_generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the same seed gives the same noise on every device."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(n)]


def text_to_image(
    model: LoadedModel, request: GenerationRequest, on_step: OnStep | None = None
) -> list[Image.Image]:
    """Make the pictures of a request. `on_step(i, n)` is called after each denoiser evaluation."""

    def step_ended(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        if on_step is not None:
            on_step(index + 1, pipeline.num_timesteps)
        return {}

    pipeline = borrow_pipeline(model, request.scheduler)
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
        callback_on_step_end_tensor_inputs=[],
    ).images
    return images


def denoiser_calls(model: LoadedModel, request: GenerationRequest) -> int:
    """How often the denoiser will be called; schedulers of second order call it twice a step."""
    order: int = getattr(model.schedulers[request.scheduler], "order", 1)
    return request.num_inference_steps * order


def check_prompt_length(model: LoadedModel, request: GenerationRequest) -> None:
    """Refuse what the text encoder would silently cut off.

    Raises:
        InvalidRequestError: `prompt` or `negative_prompt` has too many tokens.
    """
    limit = model.capabilities.max_prompt_tokens
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        tokens = len(model.pipeline.tokenizer(text).input_ids)
        if tokens > limit:
            raise InvalidRequestError(
                f"{field} is {tokens} tokens long and the limit of model {request.model} is "
                f"{limit}, start and end marks included",
                field=field,
            )
