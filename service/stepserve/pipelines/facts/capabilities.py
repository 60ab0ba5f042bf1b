"""What a loaded pipeline can do, read off the pipeline and its folder."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepserve.domain.guidance import Guidance
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.tasks import Role, Task
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.classes import CLASS_LABELS, read_classes
from stepserve.pipelines.facts.guiders import GUIDER_SCALE, usual_guider_scale
from stepserve.pipelines.facts.pipeline_tasks import ARGUMENTS, pipeline_tasks, unknown_needs
from stepserve.pipelines.facts.signature import CallSignature
from stepserve.pipelines.facts.upscalers import Upscaler, read_upscaler

MANIFEST = "stepserve.json"
# The side that pipelines use which know no sample size.
USUAL_NATIVE_PX = 1024
USUAL_STEP_PX = 64
# Hardly any text has more in the mean; what decides is how many tokens there are.
TOKEN_CHARACTERS = 8
# Language models read whole books, at a price that grows with the square of their length.
MOST_PROMPT_CHARACTERS = 8192
# What guidance scales are passed as, the likeliest first: which one has an effect is tried later.
GUIDANCE_ARGUMENTS = (
    "guidance_scale",
    "true_cfg_scale",
    "prior_guidance_scale",
    "decoder_guidance_scale",
    "distilled_guidance_scale",
)


# What calls say how many images to make with; of class labels it is one an image.
COUNTS = ("num_images_per_prompt", "batch_size", "class_labels")


@dataclass(frozen=True)
class Facts:
    """What capabilities are derived from, beside the pipeline itself."""

    signature: CallSignature
    schedulers: tuple[str, ...]
    prompt_tokens: int | None


def denoiser_of(pipeline: Any) -> Any:
    """The module that is called at every step, or None where the pipeline has no usual one."""
    return getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)


def check_is_served(pipeline_class: type, signature: CallSignature) -> None:
    """Refuse a pipeline that makes no images, or needs what no request can give.

    Raises:
        ModelLoadError: it does none of the tasks that are served.
    """
    name = pipeline_class.__name__
    if not signature.names:
        raise ModelLoadError(f"{name} has no call of its own; its folder may name another class")
    if signature.makes != "images":
        raise ModelLoadError(f"{name} makes {signature.makes}, not images")
    if needs := unknown_needs(name, signature):
        raise ModelLoadError(f"{name} needs arguments that no request can give: {', '.join(needs)}")


def check_steps(scheduler: Any) -> None:
    """Refuse a scheduler that works in another way than by steps.

    Raises:
        ModelLoadError: it has none.
    """
    if not hasattr(scheduler, "step"):
        raise ModelLoadError(f"its scheduler {type(scheduler).__name__} has no method `step`")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's `stepserve.json`, empty where there is none."""
    path = folder / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(manifest, dict):
        raise ModelLoadError(f"{MANIFEST} must hold names and values")
    return manifest


def describe_model(
    model_id: str, folder: Path, pipeline: Any, facts: Facts, manifest: dict[str, Any]
) -> ModelCapabilities:
    """Limits and defaults as the manifest says, the rest derived from the pipeline itself."""
    said = dict(manifest)
    sizes = said.pop("sizes", None)
    names = said.pop(CLASS_LABELS, None)
    # Others tell their denoiser something else where it has room for classes.
    takes_class = facts.signature.accepts(CLASS_LABELS)
    classes = read_classes(pipeline, denoiser_of(pipeline) if takes_class else None, names)
    derived = {
        "description": f"{type(pipeline).__name__} from {folder.name}",
        "created": int((folder / "model_index.json").stat().st_mtime),
        "default_scheduler": type(pipeline.scheduler).__name__,
        **_call_defaults(pipeline, facts.signature),
    }
    if _upscales(pipeline, facts.signature):
        upscaler = read_upscaler(pipeline)
        derived |= _upscaling_defaults(upscaler, facts.signature)
        sizes = sizes or asdict(upscaler.sizes)
    if facts.prompt_tokens is None:
        # Nothing counts tokens, so that only the characters are limited.
        characters = said.get("max_prompt_characters", ModelCapabilities.max_prompt_characters)
        derived["max_prompt_tokens"] = characters
    else:
        derived["max_prompt_tokens"] = facts.prompt_tokens
        derived["max_prompt_characters"] = _most_characters(facts.prompt_tokens)
    capabilities = ModelCapabilities(
        id=model_id,
        sizes=SizeRange(**sizes) if sizes else derive_sizes(pipeline, facts.signature),
        schedulers=facts.schedulers,
        classes=classes,
        **(derived | said),
    )
    if capabilities.default_scheduler not in facts.schedulers:
        raise ModelLoadError(
            f"its default scheduler {capabilities.default_scheduler} is none of those it can use: "
            f"{', '.join(facts.schedulers)}"
        )
    return capabilities


def _upscales(pipeline: Any, signature: CallSignature) -> bool:
    tasks = pipeline_tasks(type(pipeline).__name__, signature)
    return any(done.task is Task.UPSCALING for done in tasks)


def _upscaling_defaults(upscaler: Upscaler, signature: CallSignature) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "upscale_factor": upscaler.factor,
        "max_noise_level": upscaler.max_noise_level,
    }
    usual = _input_default(Role.NOISE_LEVEL, signature)
    if usual is not None and upscaler.max_noise_level is not None:
        defaults["default_noise_level"] = min(int(usual), upscaler.max_noise_level)
    if not signature.accepts("num_images_per_prompt"):
        defaults["max_n"] = 1
    return defaults


def _input_default(role: Role, signature: CallSignature) -> float | None:
    """The number that a pipeline's authors chose for an input, or None."""
    usual = (signature.default(name, int | float) for name in ARGUMENTS[role])
    return next((float(number) for number in usual if number is not None), None)


def _most_characters(prompt_tokens: int) -> int:
    usual = ModelCapabilities.max_prompt_characters
    return max(usual, min(TOKEN_CHARACTERS * prompt_tokens, MOST_PROMPT_CHARACTERS))


def guidance_arguments(pipeline: Any, signature: CallSignature) -> tuple[str, ...]:
    """What may carry a guidance scale, the likeliest first: arguments of a call, or its guider."""
    guider = () if usual_guider_scale(pipeline) is None else (GUIDER_SCALE,)
    return *guider, *(name for name in GUIDANCE_ARGUMENTS if signature.accepts(name))


def usual_guidance_scale(pipeline: Any, signature: CallSignature, argument: str) -> float | None:
    """What the pipeline's authors chose for that argument; None where they chose no number."""
    if argument == GUIDER_SCALE:
        return usual_guider_scale(pipeline)
    scale = signature.default(argument, int | float)
    return None if scale is None else float(scale)


def promised_guidance(pipeline: Any, signature: CallSignature) -> Guidance:
    """How a pipeline takes guidance by its signature; `guidance_cost` finds out what holds.

    An argument without a number as its default is one that most models of a class cannot use.
    """
    offered = guidance_arguments(pipeline, signature)
    usual = {name: usual_guidance_scale(pipeline, signature, name) for name in offered}
    chosen = [name for name in offered if usual[name] is not None]
    argument = next(iter(chosen or offered), "")
    takes_negative = signature.accepts("negative_prompt")
    needs_negative = takes_negative and argument == "true_cfg_scale"
    return Guidance(argument, negative_prompt=takes_negative, needs_negative=needs_negative)


def derive_sizes(pipeline: Any, signature: CallSignature) -> SizeRange:
    """Half to twice the native side, in steps that the pipeline takes as they are."""
    step = _step_px(pipeline)
    most = _most_px(pipeline)
    native = min(_native_px(pipeline, signature), most or sys.maxsize)
    if not signature.accepts("height"):
        return SizeRange(minimum=native, maximum=native, step=step, native=native)
    minimum = max(native // 2 // step, 1) * step
    maximum = min(native * 2, most or sys.maxsize)
    return SizeRange(minimum=minimum, maximum=maximum, step=step, native=native)


def _call_defaults(pipeline: Any, signature: CallSignature) -> dict[str, Any]:
    """Defaults that the pipeline's authors chose; a limit of one where there is no choice."""
    defaults: dict[str, Any] = {}
    steps = signature.default("num_inference_steps", int)
    if steps:
        defaults["default_num_inference_steps"] = steps
    guidance = promised_guidance(pipeline, signature)
    defaults["guidance"] = guidance
    if not guidance.argument:
        defaults |= {"default_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    elif (scale := usual_guidance_scale(pipeline, signature, guidance.argument)) is not None:
        defaults["default_guidance_scale"] = scale
    # Lower ones turn guidance off.
    if (image_scale := _input_default(Role.IMAGE_GUIDANCE, signature) or 0.0) >= 1:
        defaults["default_image_guidance_scale"] = image_scale
    if not any(map(signature.accepts, COUNTS)):
        defaults["max_n"] = 1
    return defaults


def _step_px(pipeline: Any) -> int:
    denoiser = denoiser_of(pipeline)
    if denoiser is None:
        return USUAL_STEP_PX
    processor = getattr(getattr(pipeline, "image_processor", None), "config", None)
    # Pipelines that pack latents two by two say so here.
    packed = getattr(processor, "vae_scale_factor", 1)
    return math.lcm(_scale(pipeline) * _latent_step(denoiser.config), packed)


def _latent_step(config: Any) -> int:
    """A UNet halves the latents between its levels; a transformer cuts them into patches."""
    levels = getattr(config, "block_out_channels", None)
    patch = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", None) or 1
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    return int(patch) if levels is None else 2 ** (len(levels) - 1)


def _native_px(pipeline: Any, signature: CallSignature) -> int:
    height = signature.default("height", int)
    if height:
        return int(height)
    config = getattr(denoiser_of(pipeline), "config", None)
    latents = getattr(pipeline, "default_sample_size", None) or getattr(config, "sample_size", None)
    if isinstance(latents, list | tuple):
        if len(set(latents)) > 1 and not signature.accepts("height"):
            # Requests name one size for both sides, where a model has one only.
            sides = "x".join(map(str, latents))
            raise ModelLoadError(f"its one size is not square: its denoiser was made for {sides}")
        latents = max(latents)
    if latents:
        return int(latents) * _scale(pipeline)
    if not signature.accepts("height"):
        raise ModelLoadError(f"its size is not known: say `sizes` in {MANIFEST}")
    return USUAL_NATIVE_PX


def _most_px(pipeline: Any) -> int | None:
    """The side beyond which a transformer has no positions, where it has a table of them."""
    denoiser = denoiser_of(pipeline)
    positions = getattr(getattr(denoiser, "config", None), "pos_embed_max_size", None)
    if not positions:
        return None
    # AuraFlow counts all positions, the others those along one side.
    side = math.isqrt(positions) if "AuraFlow" in type(denoiser).__name__ else positions
    return int(side) * _scale(pipeline) * _latent_step(denoiser.config)


def _scale(pipeline: Any) -> int:
    factor = getattr(pipeline, "vae_scale_factor", None)
    factor = factor or getattr(pipeline, "movq_scale_factor", None)
    # Some do not say it: an autoencoder halves an image between two levels.
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    levels = getattr(getattr(autoencoder, "config", None), "block_out_channels", (1,))
    return int(factor or 2 ** (len(levels) - 1))
