"""Requests of all tasks, and what plain diffusers makes of them: it knows nothing of Stepserve.

For inpainting diffusers wants to hear of 4 channels before it blends; the embedded model's latents
have more, so the plain UNet's config is made to say so.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from parity_cases import largest_byte_difference
from PIL import Image, ImageDraw
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.pipelines.requests.images import encode_image
from usual_tasks import USUAL_TASKS

TASKS = tuple(USUAL_TASKS)
STRENGTHS = (0.5, 0.8, 1.0, 0.65)
SIZES = ((64, 64), (64, 64), (64, 64), (96, 64))


def photo(width: int = 80, height: int = 80) -> Image.Image:
    """A shape on a ground, of a size of its own."""
    image = Image.new("RGB", (width, height), (40, 90, 200))
    ImageDraw.Draw(image).ellipse((10, 14, width - 12, height - 8), fill=(230, 40, 30))
    return image


def mask(width: int = 64, height: int = 64) -> Image.Image:
    """White in the middle."""
    image = Image.new("L", (width, height), 0)
    middle = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(image).rectangle(middle, fill=255)
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def request_for(task: Task, index: int, scheduler: str, **changes: Any) -> GenerationRequest:
    width, height = SIZES[index // len(TASKS) % len(SIZES)]
    guidance_scale = (4.0, 7.5, 1.0, 4.0, 5.0)[index % 5]
    request = GenerationRequest(
        id=f"{task}/{index}",
        model="emoji",
        prompt=("red heart", "rocket on a blue background", "smiling cat face")[index % 3],
        negative_prompt=("", "blurry")[index % 2 if guidance_scale > 1 else 0],
        width=width,
        height=height,
        num_inference_steps=(5, 6, 4, 7)[index % 4],
        guidance_scale=guidance_scale,
        seed=100 + 10 * index,
        scheduler=scheduler,
        n=(1, 1, 2)[index // 2 % 3],
        task=task,
        images=() if task is Task.TEXT_TO_IMAGE else (png(photo()),),
        mask=png(mask()) if task is Task.INPAINTING else None,
        strength=None if task is Task.TEXT_TO_IMAGE else STRENGTHS[index % len(STRENGTHS)],
    )
    return replace(request, **changes)


def requests_of_all_tasks(schedulers: Sequence[str]) -> list[GenerationRequest]:
    pairs = [(scheduler, task) for scheduler in schedulers for task in TASKS]
    return [request_for(task, index, scheduler) for index, (scheduler, task) in enumerate(pairs)]


def plain_pipeline(text_to_image: Any, request: GenerationRequest) -> Any:
    """diffusers' own class for the task, over the plain pipeline's modules."""
    parts = dict(text_to_image.components)
    cls: Any = type(text_to_image)
    if request.task is Task.IMAGE_TO_IMAGE:
        cls = StableDiffusionImg2ImgPipeline
    if request.task is Task.INPAINTING:
        cls = StableDiffusionInpaintPipeline
        parts["unet"] = copy.copy(parts["unet"])
        parts["unet"].register_to_config(in_channels=4)
    pipeline = cls(**parts, requires_safety_checker=False)
    # As users change it. A constructor may alter the settings of the scheduler that it gets.
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(text_to_image.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_arguments(request: GenerationRequest) -> dict[str, Any]:
    """What the plain pipeline of its task is called with."""
    size = request.width, request.height
    arguments: dict[str, Any] = {"width": size[0], "height": size[1]}
    if request.task is not Task.TEXT_TO_IMAGE:
        resized = photo().resize(size, Image.Resampling.LANCZOS)
        arguments = {"image": resized, "strength": request.strength}
    if request.task is Task.INPAINTING:
        resized = mask().resize(size, Image.Resampling.LANCZOS)
        # One for each image, so that each is encoded with noise of its own seed.
        arguments["image"] = [arguments["image"]] * request.n
        arguments |= {"mask_image": resized, "width": size[0], "height": size[1]}
    seeds = range(request.seed, request.seed + request.n)
    return arguments | {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "num_images_per_prompt": request.n,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    }


def call_plain(text_to_image: Any, request: GenerationRequest, **extra: Any) -> list[Image.Image]:
    pipeline = plain_pipeline(text_to_image, request)
    images: list[Image.Image] = pipeline(**plain_arguments(request), **extra).images
    return images


def differences(
    requests: Sequence[GenerationRequest],
    finished: Sequence[Finished],
    wanted: Sequence[list[Image.Image]],
) -> dict[str, int]:
    """Files that differ from the plain images, and by how many levels at most."""
    found = {}
    for request, answer, images in zip(requests, finished, wanted, strict=True):
        assert len(answer.images) == request.n == len(images)
        for index, (file, image) in enumerate(zip(answer.images, images, strict=True)):
            assert image.size == (request.width, request.height)
            if file != encode_image(image, request, index):
                served = Image.open(io.BytesIO(file.data))
                name = f"{request.id} {request.scheduler} #{index}"
                found[name] = largest_byte_difference(served, image)
    return found


def expected_calls(request: GenerationRequest) -> int:
    """Worked out by hand: Heun calls twice a step but for the last one."""
    steps = request.num_inference_steps
    if request.strength is not None:
        steps = int(steps * request.strength)
    return 2 * steps - 1 if request.scheduler == "HeunDiscreteScheduler" else steps
