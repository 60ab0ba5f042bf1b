"""Checks of a request against the limits of its model. Pure; ingress and replica both run them.

Messages use the HTTP names of fields: a wrong width or height is a wrong `size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stepserve.domain.checks.control_limits import check_controls
from stepserve.domain.checks.input_limits import check_inputs
from stepserve.domain.checks.trajectory_limits import check_trajectory
from stepserve.domain.checks.wording import did_you_mean, digits, shown
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import AdapterUse, GenerationRequest, OutputFormat
from stepserve.domain.step_cache import (
    LEAST_THRESHOLD,
    MOST_THRESHOLD,
    OFF,
    StepCacheMethod,
    StepCacheUse,
)
from stepserve.domain.tasks import Role

MAX_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""

MAX_ADAPTER_SCALE = 10.0
"""No adapter gives a usable image with a larger scale, positive or negative."""

MIN_DEADLINE_S = 0.001
"""No request takes less, and smaller numbers would underflow in computations."""

MAX_PREVIEWS = 50
"""Each takes about as long as one or two denoising steps."""

SHOWN_NAMES = 20


def check_request(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Return if `model` can serve `request` as it is.

    Raises:
        InvalidRequestError: names the first field out of bounds, its value and its limit.
    """
    check_inputs(request, model)
    check_controls(request, model)
    _check_prompts(request, model)
    _check_size(request, model)
    _check_scheduler(request.scheduler, model)
    _check_steps(request, model)
    _check_guidance_scale(request.guidance_scale, model)
    _check_image_guidance(request, model)
    _check_negative_prompt(request, model)
    _check_guidance_interval(request, model)
    _check_step_cache(request.step_cache, model)
    _check_images(request.n, model)
    _check_adapters(request.adapters, model)
    _check_seed(request)
    _check_deadline(request.deadline_s)
    _check_whole_number("previews", request.previews, 0, MAX_PREVIEWS)
    check_trajectory(request, model)
    _check_compression(request)


def check_adapter_names(adapters: Iterable[AdapterUse], known: Sequence[str]) -> None:
    """Return if all `adapters` are among the `known` names.

    Not part of `check_request`, as files may be added at any time: only the replica knows.

    Raises:
        InvalidRequestError: names the first adapter that is not known.
    """
    for use in adapters:
        if use.name not in known:
            listed = ", ".join(known[:SHOWN_NAMES]) + (", ..." if len(known) > SHOWN_NAMES else "")
            raise InvalidRequestError(
                f"adapters: {shown(use.name)} is not known{did_you_mean(use.name, known)} "
                f"(known: {listed or 'none'})",
                "adapters",
            )


def _check_prompts(request: GenerationRequest, model: ModelCapabilities) -> None:
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        _check_text(field, text, model.max_prompt_characters)


def _check_text(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        message = f"{field} is {len(text)} characters long; the limit is {limit}"
        raise InvalidRequestError(message, field)
    # JSON can hold a lone surrogate ("\ud800"), which no tokenizer or response can.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequestError(f"{field} {shown(text)} is not valid Unicode text", field)


def _check_size(request: GenerationRequest, model: ModelCapabilities) -> None:
    if model.sizes.accepts(request.width) and model.sizes.accepts(request.height):
        return
    raise InvalidRequestError(
        f"size {request.width}x{request.height} is not accepted by {model.id!r}: "
        f"each side must be {model.sizes.describe()}",
        "size",
    )


def _check_whole_number(field: str, value: int, least: int, most: int, remark: str = "") -> None:
    if not least <= value <= most:
        message = f"{field} must be {least} to {most}, got {digits(value)}{remark}"
        raise InvalidRequestError(message, field)


def _check_images(n: int, model: ModelCapabilities) -> None:
    if model.max_n == 1 and n != 1:
        message = f"n must be 1, got {digits(n)}: model {model.id!r} makes one image a request"
        raise InvalidRequestError(message, "n")
    _check_whole_number("n", n, 1, model.max_n)


def _check_steps(request: GenerationRequest, model: ModelCapabilities) -> None:
    steps, limits = request.num_inference_steps, model.steps_of(request.scheduler)
    remark = f" (with scheduler {request.scheduler})"
    _check_whole_number("num_inference_steps", steps, limits.minimum, limits.maximum, remark)


def _check_guidance_scale(value: float, model: ModelCapabilities) -> None:
    maximum = model.max_guidance_scale
    if 0 <= value <= maximum:  # NaN is not: every comparison with it is false
        return
    message = f"guidance_scale must be 0 to {maximum:g}, got {value}"
    if not model.guidance.argument:
        message += f": model {model.id!r} takes no guidance; leave it out"
    raise InvalidRequestError(message, "guidance_scale")


def _check_image_guidance(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Refuse one that turns guidance off, or would change nothing."""
    scale, field = request.image_guidance_scale, "image_guidance_scale"
    if scale is None:
        return
    if not 1 <= scale <= model.max_guidance_scale:
        message = f"{field} must be 1 to {model.max_guidance_scale:g}, got {scale}"
        raise InvalidRequestError(message, field)
    if not model.guidance.guides(request.guidance_scale):
        raise InvalidRequestError(
            f"{field} has no effect without guidance: set guidance_scale over "
            f"{model.guidance.above:g} (got {request.guidance_scale:g}), or leave {field} out",
            field,
        )


def _check_negative_prompt(request: GenerationRequest, model: ModelCapabilities) -> None:
    """Refuse one that would change nothing."""
    if request.negative_prompt and (objection := _negative_objection(request, model)):
        raise InvalidRequestError(f"negative_prompt {objection}", "negative_prompt")


def _negative_objection(request: GenerationRequest, model: ModelCapabilities) -> str:
    guidance = model.guidance
    if Role.PROMPT not in model.inputs_of(request.task):
        return f"must be left out: {request.task} with model {model.id!r} takes no prompt"
    if not guidance.negative_prompt:
        return (
            f"has no effect on model {model.id!r}: leave it out, and describe the image in prompt"
        )
    if not guidance.argument or guidance.guides(request.guidance_scale):
        return ""
    scale = f"guidance_scale over {guidance.above:g} (got {request.guidance_scale:g})"
    if not request.prompt:
        # Requests without a prompt are without guidance, unless they ask for it.
        return f"has no effect, as there is no prompt: send one, set {scale}, or leave it out"
    return f"has no effect without guidance: set {scale}, or leave negative_prompt out"


def _check_guidance_interval(request: GenerationRequest, model: ModelCapabilities) -> None:
    start, end = request.guidance_start, request.guidance_end
    if not 0 <= start < 1:
        message = f"guidance_start must be at least 0 and less than 1, got {start}"
        raise InvalidRequestError(message, "guidance_start")
    if not start < end <= 1:
        message = f"guidance_end must be over guidance_start ({start}) and at most 1, got {end}"
        raise InvalidRequestError(message, "guidance_end")
    if request.is_guidance_limited and not model.guidance_interval:
        field, only, given = ("guidance_start", 0, start) if start > 0 else ("guidance_end", 1, end)
        raise InvalidRequestError(
            f"{field} must be {only}, got {given}: model {model.id!r} applies guidance at every "
            "step",
            field,
        )


def _check_step_cache(use: StepCacheUse | None, model: ModelCapabilities) -> None:
    if use is None:
        return
    if not model.step_cache_methods:
        message = f"step_cache must be {OFF!r}: model {model.id!r} can skip no calls"
        raise InvalidRequestError(message, "step_cache")
    if use.method not in model.step_cache_methods:
        raise InvalidRequestError(
            f"step_cache.method {shown(use.method.value)} cannot be used with model {model.id!r} "
            f"(usable: {', '.join(model.step_cache_methods)}){_how_to_have(use.method)}",
            "step_cache.method",
        )
    if not LEAST_THRESHOLD <= use.threshold <= MOST_THRESHOLD:  # NaN ends here too
        limits = f"{LEAST_THRESHOLD:g} to {MOST_THRESHOLD:g}"
        message = f"step_cache.threshold must be {limits}, got {use.threshold}"
        raise InvalidRequestError(message, "step_cache.threshold")


def _how_to_have(method: StepCacheMethod) -> str:
    if method is not StepCacheMethod.MAGCACHE:
        return ""
    return "; its operator adds 'magcache' by `stepserve calibrate`"


def _check_deadline(deadline_s: float | None) -> None:
    if deadline_s is not None and not MIN_DEADLINE_S <= deadline_s < math.inf:
        message = f"deadline_s must be at least {MIN_DEADLINE_S:g} seconds, got {deadline_s}"
        raise InvalidRequestError(message, "deadline_s")


def _check_compression(request: GenerationRequest) -> None:
    quality = request.output_compression
    if quality is None:
        return
    _check_whole_number("output_compression", quality, 0, 100)
    if request.output_format is OutputFormat.PNG and quality != 100:
        raise InvalidRequestError(
            f"output_compression {quality} needs output_format 'jpeg' or 'webp': png is lossless",
            "output_compression",
        )


def _check_scheduler(name: str, model: ModelCapabilities) -> None:
    known = model.schedulers
    if name in model.unusable_schedulers:
        raise InvalidRequestError(
            f"scheduler {shown(name)} cannot be used by model {model.id!r} (it can use: "
            f"{', '.join(known)})",
            "scheduler",
        )
    if name not in known:
        raise InvalidRequestError(
            f"scheduler {shown(name)} is not known{did_you_mean(name, known)} "
            f"(known: {', '.join(known)})",
            "scheduler",
        )


def _check_adapters(adapters: tuple[AdapterUse, ...], model: ModelCapabilities) -> None:
    if len(adapters) > model.max_adapters:
        raise InvalidRequestError(_too_many_adapters(adapters, model), "adapters")
    names = [use.name for use in adapters]
    for use in adapters:
        if names.count(use.name) > 1:
            message = f"adapters: {shown(use.name)} is named more than once"
            raise InvalidRequestError(message, "adapters")
        _check_adapter_scale(use)


def _too_many_adapters(adapters: tuple[AdapterUse, ...], model: ModelCapabilities) -> str:
    if model.max_adapters:
        return (
            f"adapters: model {model.id!r} takes at most {model.max_adapters}, got {len(adapters)}"
        )
    return f"adapters: model {model.id!r} has none, got {shown(adapters[0].name)}; leave them out"


def _check_adapter_scale(use: AdapterUse) -> None:
    if not abs(use.scale) <= MAX_ADAPTER_SCALE:  # NaN ends here too
        limits = f"-{MAX_ADAPTER_SCALE:g} to {MAX_ADAPTER_SCALE:g}"
        message = f"adapters: the scale of {shown(use.name)} must be {limits}, got {use.scale}"
        raise InvalidRequestError(message, "adapters")


def _check_seed(request: GenerationRequest) -> None:
    # Image i is made from seed + i, so the seed of the last one must be valid as well.
    maximum = MAX_SEED - (request.n - 1)
    if not 0 <= request.seed <= maximum:
        message = f"seed must be 0 to {maximum} (for n={request.n}), got {digits(request.seed)}"
        raise InvalidRequestError(message, "seed")
