"""One request as an ordinary call of an ordinary diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image

from stepserve.domain.errors import ContentFilteredError, GenerationFailedError, InvalidRequestError
from stepserve.domain.guidance import Guidance
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Role
from stepserve.engine.tracks.interception import parameter_names
from stepserve.pipelines.controls.steering import Steering
from stepserve.pipelines.copies.factory import schedulers_of
from stepserve.pipelines.copies.safety_checker import guardrail, remove_checker, withheld_images
from stepserve.pipelines.facts.guiders import GUIDER_SCALE, set_guidance_scale
from stepserve.pipelines.facts.pipeline_tasks import PipelineTask
from stepserve.pipelines.facts.signature import CallSignature, accepted_arguments
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.references.adapters import Reference
from stepserve.pipelines.requests.failures import blaming_settings, cannot_be_done
from stepserve.pipelines.requests.inputs import InputImages
from stepserve.pipelines.requests.previews import OnPreview, Previewer, can_preview
from stepserve.pipelines.requests.trajectory import Recorder, Trajectory
from stepserve.pipelines.schedulers.probes import set_steps, try_ends
from stepserve.pipelines.schedulers.watch import draw_from, drop_unknown, watch_images, watch_steps

OnStep = Callable[[int, int], None]
NO_IMAGES = InputImages()


@dataclass(frozen=True)
class Phase:
    """One pipeline call of a request that takes several.

    Args:
        generators: one for each image, which all calls draw from.
        steps_before: that were made by earlier calls.
        steps_after: that later ones will make.
    """

    generators: Sequence[torch.Generator]
    steps_before: int = 0
    steps_after: int = 0


# What the authors of Qwen-Image give; no encoder sees more in it than in an empty one.
NO_NEGATIVE_PROMPT = " "


def make_images(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputImages = NO_IMAGES,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
    steering: Steering | None = None,
    phase: Phase | None = None,
    trajectory: Trajectory | None = None,
) -> list[Image.Image | None]:
    """Make the images of a request. `on_step(i, n)` is called after each scheduler step.

    In place of an image that the pipeline's own safety checker withheld there is None.

    Args:
        model: that is asked.
        request: without `hires`.
        inputs: the images that it brings along.
        on_step: hears of each step of all phases.
        on_preview: hears of each preview.
        phase: which call of a larger request this is; None: it is all.
        trajectory: gets the steps.

    Raises:
        ContentFilteredError: the checker withheld all.
        GenerationFailedError: the denoiser's or the VAE's numbers overflowed.
        InvalidRequestError: its settings alone make the call fail, or its steps are not seen.
    """
    output = run_pipeline(
        model,
        request,
        inputs,
        on_step,
        on_preview=on_preview,
        steering=steering,
        phase=phase,
        trajectory=trajectory,
    )
    if trajectory is not None:
        trajectory.finish()
    images, withheld = list(output[0]), withheld_images(output)
    if withheld and len(withheld) == len(images):
        raise ContentFilteredError(
            f"the safety checker of model {request.model} withheld all images of the request; "
            "try another prompt or seed"
        )
    return [None if index in withheld else image for index, image in enumerate(images)]


def call_pipeline(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputImages = NO_IMAGES,
    output_type: str = "pil",
) -> Any:
    """What a pipeline draws for a request, whatever its safety checker would say of it."""
    return run_pipeline(model, request, inputs, output_type=output_type, is_checked=False)[0]


def run_pipeline(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputImages = NO_IMAGES,
    on_step: OnStep | None = None,
    output_type: str = "pil",
    on_preview: OnPreview | None = None,
    is_checked: bool = True,
    steering: Steering | None = None,
    phase: Phase | None = None,
    trajectory: Trajectory | None = None,
) -> Any:
    """Call a copy of the pipeline with those of a request's arguments that it takes.

    Args:
        model: what is asked.
        request: by whom.
        inputs: its images.
        on_step: is told of each step.
        output_type: as diffusers has it.
        on_preview: is given previews.
        is_checked: whether the pipeline's own checker looks at the images.
        steering: what its controls are called by, where their networks are the model's.
        trajectory: gets its steps.

    Raises:
        ContentFilteredError: the pipeline's own checker refuses the prompt.
        InvalidRequestError: the request's settings alone make the call fail.
    """
    signature = _signature(model, request, steering)
    phase = phase or Phase(generators_of(request))
    generators = phase.generators
    copied = _copy_for(model, request, generators, steering)
    remove_checker(copied, unless=is_checked)
    previewer = _previewer(copied, request, on_preview if model.capabilities.previews else None)
    recorder = None if trajectory is None else Recorder(copied, trajectory)
    expected = denoiser_calls(model, request)

    def ended(step: int, steps: int, latents: torch.Tensor) -> None:
        done, in_all = phase.steps_before + step, phase.steps_before + steps + phase.steps_after
        if on_step is not None:
            on_step(done, in_all)
        if previewer is not None:
            previewer.step_ended(done, in_all)
        if recorder is not None:
            recorder.step_ended(step, steps, latents)
        if step == steps:
            _check_finite(latents, request)

    def step_ended(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        ended(index + 1, getattr(pipeline, "num_timesteps", expected), values["latents"])
        return {}

    # Some that do not know it take anything, and leave it lying.
    if "callback_on_step_end" not in signature.names:
        watch_steps(copied.scheduler, lambda step, latents: ended(step, expected, latents))

    watch_images(copied, lambda image: _check_image(image, request))
    wanted = {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "num_images_per_prompt": request.n,
        "batch_size": request.n,
        "generator": generators,
        "callback_on_step_end": step_ended,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "output_type": output_type,
        **guidance_arguments(model.capabilities.guidance, request),
        **input_arguments(model.factory.tasks[request.task], request, inputs),
        **reference_arguments(model, copied, request, inputs),
        **control_arguments(request, inputs, steering),
    }
    make = partial(model.factory.new_scheduler, request.scheduler)
    with blaming_settings(request, make), guardrail(request.model):
        return copied(**accepted_arguments(signature, wanted))


def _signature(
    model: LoadedModel, request: GenerationRequest, steering: Steering | None
) -> CallSignature:
    return model.factory.signature(request.task) if steering is None else steering.signature


def generators_of(request: GenerationRequest) -> list[torch.Generator]:
    """One for each image, on the CPU, so that a seed gives the same noise on every device."""
    return [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)]


def _copy_for(
    model: LoadedModel,
    request: GenerationRequest,
    generators: Sequence[torch.Generator],
    steering: Steering | None = None,
) -> Any:
    """A pipeline whose every draw is of the request's own generators, and guider of its scale."""
    if steering is None:
        copied = model.factory.copy(request.scheduler, request.task)
    else:
        copied = model.factory.copy_of(steering.pipeline, request.scheduler)
    for scheduler in schedulers_of(copied):
        drop_unknown(scheduler)
        draw_from(scheduler, generators)
    if model.capabilities.guidance.argument == GUIDER_SCALE:
        set_guidance_scale(copied, request.guidance_scale)
    return copied


def _previewer(
    pipeline: Any, request: GenerationRequest, on_preview: OnPreview | None
) -> Previewer | None:
    if request.previews == 0 or on_preview is None or not can_preview(pipeline):
        return None
    return Previewer(pipeline, request, on_preview)


def guidance_arguments(guidance: Guidance, request: GenerationRequest) -> dict[str, Any]:
    """The scale and the negative prompt as the model takes them."""
    arguments: dict[str, Any] = {}
    if guidance.argument and guidance.argument != GUIDER_SCALE:
        arguments[guidance.argument] = request.guidance_scale
    # Pipelines differ in what stands for none.
    if request.negative_prompt:
        arguments["negative_prompt"] = request.negative_prompt
    elif guidance.needs_negative and guidance.guides(request.guidance_scale):
        arguments["negative_prompt"] = NO_NEGATIVE_PROMPT
    return arguments


def input_arguments(
    task: PipelineTask, request: GenerationRequest, inputs: InputImages
) -> dict[str, Any]:
    """What a request brings along, as the pipeline call of its task takes it."""
    values = {
        Role.PROMPT: request.prompt,
        Role.CLASS_LABEL: None
        if request.class_label is None
        else [request.class_label] * request.n,
        Role.IMAGE: _images(task, inputs.images, request.n),
        Role.MASK: inputs.mask,
        Role.STRENGTH: request.strength,
        Role.IMAGE_GUIDANCE: request.image_guidance_scale,
        Role.NOISE_LEVEL: request.noise_level,
        Role.CONTROL: next(iter(inputs.controls), None),
    }
    given = {role: values[role] for role in task.arguments if values[role] is not None}
    named = {task.arguments[role]: value for role, value in given.items()}
    return named | _size_arguments(task, request) | _second_image(task, inputs.images)


def _images(
    task: PipelineTask, images: Sequence[Image.Image], made: int
) -> Image.Image | list[Image.Image] | None:
    """One image, or a list: of several, or with one for each that is `made`."""
    if not images:
        return None
    takes_one = task.inputs[Role.IMAGE].most == 1
    if not ((takes_one and len(images) == 1) or task.second_image):
        return list(images)
    return [images[0]] * made if task.has_one_each else images[0]


def _second_image(task: PipelineTask, images: Sequence[Image.Image]) -> dict[str, Any]:
    return {task.second_image: images[1]} if task.second_image and len(images) > 1 else {}


def _size_arguments(task: PipelineTask, request: GenerationRequest) -> dict[str, Any]:
    """For FLUX Kontext, which else makes about a million pixels of every size and image."""
    area = {"max_area": request.width * request.height}
    return area | {"_auto_resize": False} if task.is_fitted else area


def reference_arguments(
    model: LoadedModel, pipeline: Any, request: GenerationRequest, inputs: InputImages
) -> dict[str, Any]:
    """What a request's reference images are in a call of its copy of the pipeline."""
    adapters = model.references
    if adapters is None:
        return {}
    references = [
        Reference(image, use.scale, use.adapter or adapters.names[0])
        for use, image in zip(request.references, inputs.references, strict=True)
    ]
    return adapters.attach(pipeline, references, request.guidance_scale)


def control_arguments(
    request: GenerationRequest, inputs: InputImages, steering: Steering | None
) -> dict[str, Any]:
    """What a request says of its controls, beside the image of one that the model takes itself."""
    if steering is not None:
        return steering.arguments(request.controls, inputs.controls)
    if not request.controls:
        return {}
    use = request.controls[0]
    return {
        "controlnet_conditioning_scale": use.scale,
        "adapter_conditioning_scale": use.scale,
        "control_guidance_start": use.start,
        "control_guidance_end": use.end,
    }


def denoiser_calls(model: LoadedModel, request: GenerationRequest) -> int:
    """How often the denoiser will be called.

    Some schedulers call it more than once a step, and a strength below 1 leaves steps out.

    Raises:
        InvalidRequestError: the scheduler cannot do that number of steps.
    """
    wanted = request.scheduler, request.num_inference_steps, request.task, request.strength
    known = model.denoiser_calls
    if wanted not in known:
        known[wanted] = _count_timesteps(model, request)
    return known[wanted]


def _count_timesteps(model: LoadedModel, request: GenerationRequest) -> int:
    pipeline = model.factory.copy(request.scheduler, request.task)
    steps, scheduler = request.num_inference_steps, pipeline.scheduler
    try:
        set_steps(scheduler, steps)
        timesteps = left = len(scheduler.timesteps)
        if request.strength is not None:
            left = count_left(pipeline, request, timesteps)
        if request.scheduler in model.probed_schedulers:
            make = partial(model.factory.new_scheduler, request.scheduler)
            try_ends(make, steps, (timesteps - left) // scheduler.order)
    except Exception as error:
        # Such as PNDM, which begins with four steps of a higher order.
        raise cannot_be_done(request, error) from error
    if left < 1:
        message = f"strength {request.strength} of {steps} steps leaves no step"
        raise InvalidRequestError(message, "strength")
    return left


def count_left(pipeline: Any, request: GenerationRequest, timesteps: int) -> int:
    """Of these timesteps, those that a strength leaves: as the pipeline itself chooses them."""
    steps, scheduler = request.num_inference_steps, pipeline.scheduler
    strength = 1.0 if request.strength is None else request.strength
    choose = getattr(pipeline, "get_timesteps", None)
    if choose is None:
        # Pipelines of several parts leave it to one of them.
        return max(min(int(steps * strength), timesteps), 1)
    arguments = {
        "num_inference_steps": steps,
        "strength": strength,
        "timesteps": scheduler.timesteps,
        "sigmas": getattr(scheduler, "sigmas", None),
        "device": torch.device("cpu"),
    }
    taken = parameter_names(choose)
    # What comes last is a number of steps, of which some schedulers make two timesteps.
    *_, left, _ = choose(**{name: value for name, value in arguments.items() if name in taken})
    return len(left)


def _check_finite(latents: torch.Tensor, request: GenerationRequest) -> None:
    """An image of numbers that are none would be black, and look like an answer."""
    if not bool(torch.isfinite(latents).all()):
        adapters = "".join(f", adapter {use.name} at {use.scale:g}" for use in request.adapters)
        raise GenerationFailedError(
            f"request {request.id} failed: the denoiser's output is not finite "
            f"(scheduler {request.scheduler}, guidance_scale {request.guidance_scale:g}{adapters})"
        )


def _check_image(image: Any, request: GenerationRequest) -> None:
    if isinstance(image, torch.Tensor) and not bool(torch.isfinite(image).all()):
        raise GenerationFailedError(
            f"request {request.id} failed: the decoded image is not finite although its latents "
            "are: the VAE overflows in this dtype, so load the model in bfloat16 or float32"
        )
