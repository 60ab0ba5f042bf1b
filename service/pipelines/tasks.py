"""One request as an ordinary call of an ordinary diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from service.domain.errors import GenerationFailedError, InvalidRequestError
from service.domain.requests import GenerationRequest, Task
from service.pipelines.inputs import InputPictures
from service.pipelines.load import LoadedModel
from service.pipelines.previews import OnPreview, Previewer, can_preview
from service.pipelines.signature import accepted_arguments

OnStep = Callable[[int, int], None]
NO_PICTURES = InputPictures()


def make_generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the same seed gives the same noise on every device."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(n)]


def make_pictures(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputPictures = NO_PICTURES,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
) -> list[Image.Image]:
    """Make the pictures of a request. `on_step(i, n)` is called after each scheduler step.

    Raises:
        GenerationFailedError: the denoiser's numbers overflowed.
    """
    images: list[Image.Image] = call_pipeline(
        model, request, inputs, on_step, on_preview=on_preview
    )
    return images


def call_pipeline(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputPictures = NO_PICTURES,
    on_step: OnStep | None = None,
    output_type: str = "pil",
    on_preview: OnPreview | None = None,
) -> Any:
    """Call a borrowed pipeline with those of a request's arguments that it takes."""
    borrowed = model.lender.lend(request.scheduler, request.task)
    previewer = _previewer(borrowed, request, on_preview)

    def step_ended(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        if on_step is not None:
            on_step(index + 1, pipeline.num_timesteps)
        if previewer is not None:
            previewer.step_ended(index + 1, pipeline.num_timesteps)
        if index + 1 == pipeline.num_timesteps:
            _check_finite(values["latents"], request)
        return {}

    wanted = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "num_images_per_prompt": request.n,
        "generator": make_generators(request.seed, request.n),
        "callback_on_step_end": step_ended,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "output_type": output_type,
        **task_arguments(request, inputs),
    }
    signature = model.lender.signature(request.task)
    return borrowed(**accepted_arguments(signature, wanted))[0]


def _previewer(
    pipeline: Any, request: GenerationRequest, on_preview: OnPreview | None
) -> Previewer | None:
    if request.previews == 0 or on_preview is None or not can_preview(pipeline):
        return None
    return Previewer(pipeline, request, on_preview)


def task_arguments(request: GenerationRequest, inputs: InputPictures) -> dict[str, Any]:
    """What the pipeline call of one task takes and those of others do not."""
    size = {"width": request.width, "height": request.height}
    match request.task:
        case Task.TEXT_TO_IMAGE:
            return size
        case Task.IMAGE_TO_IMAGE:
            # The picture has the wanted size already, and most such pipelines take no other.
            return {"image": inputs.image, "strength": request.strength}
        case Task.INPAINTING:
            pictures = {"image": inputs.image, "mask_image": inputs.mask_image}
            return pictures | size | {"strength": request.strength}


def denoiser_calls(model: LoadedModel, request: GenerationRequest) -> int:
    """How often the denoiser will be called.

    Some schedulers call it more than once a step, and a strength below 1 leaves steps out.

    Raises:
        InvalidRequestError: the scheduler cannot do that number of steps.
    """
    strength = None if request.task is Task.TEXT_TO_IMAGE else request.strength
    wanted = request.scheduler, request.num_inference_steps, request.task, strength
    if wanted not in model.denoiser_calls:
        model.denoiser_calls[wanted] = _count_timesteps(model, request)
    return model.denoiser_calls[wanted]


def _count_timesteps(model: LoadedModel, request: GenerationRequest) -> int:
    pipeline = model.lender.lend(request.scheduler, request.task)
    steps = request.num_inference_steps
    try:
        pipeline.scheduler.set_timesteps(steps)
    except Exception as error:
        # Such as PNDM, which begins with four steps of a higher order.
        raise InvalidRequestError(
            f"num_inference_steps {steps} cannot be done by {request.scheduler}",
            "num_inference_steps",
        ) from error
    if request.task is Task.TEXT_TO_IMAGE:
        return len(pipeline.scheduler.timesteps)
    return len(pipeline.get_timesteps(steps, request.strength, torch.device("cpu"))[0])


def _check_finite(latents: torch.Tensor, request: GenerationRequest) -> None:
    """A picture of numbers that are none would be black, and look like an answer."""
    if not bool(torch.isfinite(latents).all()):
        raise GenerationFailedError(
            f"request {request.id} failed: the denoiser's output is not finite "
            f"(scheduler {request.scheduler}, guidance_scale {request.guidance_scale:g})"
        )
