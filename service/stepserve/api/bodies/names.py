"""What a name that a body does not know is likely meant as, and where it belongs.

Setting such a field aside would make another image than the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from stepserve.domain.checks.wording import SHORTEST_PART, closest

AS_EVER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "user": (),
        "safety_identifier": (),
        "quality": ("auto",),
        "moderation": ("auto",),
        "style": (),
        "background": ("auto", "opaque"),
        "complexity": (),
        "input_fidelity": (),
        "frame_count": (),
        "frame_duration_ms": (),
        "svg": (),
    }
)
"""OpenAI's fields that change nothing here, and their values that ask for nothing else."""

LIKENESS = 0.75
"""From which on a name is a slip of the pen (`sede`). Below are words: `store` is no `stream`."""

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
UPSCALE = "/v1/images/upscale"

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("image", "images", "mask", "strength", "image_guidance_scale"), f"{EDITS} takes it"
        ),
        **dict.fromkeys(("prompts", "hires", "class_label"), f"only {GENERATIONS} takes it"),
        "noise_level": f"only {UPSCALE} takes it",
    }
)
"""Which URL takes fields that a body has not."""

INSTEAD: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "controls": dict.fromkeys(
            ("control_image", "control_images"),
            "in JSON the image stands in an entry of 'controls', in a form it is a file "
            "'control_image'",
        ),
        "references": dict.fromkeys(
            ("reference_image", "reference_images"),
            "in JSON the image stands in an entry of 'references', in a form it is a file "
            "'reference_image'",
        ),
        "noise_level": dict.fromkeys(
            ("scale", "factor", "outscale", "upscale", "upscale_by", "upscale_factor"),
            "every model has a factor of its own, 'upscale_factor' in GET /v1/models: leave it out",
        ),
        "image": {"images": "one image is taken, in 'image'"},
        "image_url": {
            "file_id": "no files are kept here: send the image itself, as a 'data:' URL in "
            "'image_url'"
        },
        "model": ELSEWHERE,
        "control_image": ELSEWHERE,
    }
)
"""What to do about names that an object does not take, by a field that it has.

Each body of a request has a `model`, and each form takes files `control_image`.
"""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "size": ("width", "height", "aspect_ratio"),
        "n": ("num_images", "num_images_per_prompt", "num_outputs", "batch_size"),
        "scheduler": ("sampler", "sampler_name"),
        "guidance_scale": ("cfg", "cfg_scale"),
        "adapters": ("lora", "loras"),
        "image": (
            *("image_url", "init_image", "input_image", "source_image"),
            *("control_image", "reference_image"),
        ),
        "image_url": ("url", "b64_json", "base64"),
        "mask": ("mask_image", "mask_url"),
        "strength": ("denoising_strength", "image_strength", "prompt_strength"),
        "references": ("ip_adapter_image", "ip_adapter_scale", "ip_adapters"),
        "controls": (
            *("controlnet", "controlnets", "controlnet_conditioning_scale"),
            *("control_guidance_start", "control_guidance_end", "control_scale"),
        ),
        "hires": (
            *("enable_hr", "hires_fix", "hires_scale", "hires_strength", "hires_steps"),
            *("hr_scale", "hr_second_pass_steps", "upscale", "upscale_by", "upscale_factor"),
        ),
        "step_cache": (
            *("cache_backend", "cache_config", "cache_dit", "cache_threshold", "easycache"),
            *("enable_teacache", "first_block_cache", "magcache", "teacache", "teacache_params"),
        ),
        "trajectory": ("return_trajectory", "return_latents", "return_intermediates"),
        "threshold": ("magcache_thresh", "rel_l1_thresh", "reuse_threshold", "thresh"),
        "scale": ("factor", "upscale_by", "upscale_factor", "strength", "weight"),
        "start": ("guidance_start", "control_guidance_start"),
        "end": ("guidance_end", "control_guidance_end"),
        "preprocessor": ("module",),
        "adapter": ("name", "ip_adapter"),
        "method": ("mode", "name", "type"),
        "name": ("type", "control_type"),
    }
)
"""What other servers call fields of ours, in small letters."""


def hint(name: str, fields: Iterable[str]) -> str:
    """Return what to do about an unknown `name` that is likely meant as a field; else nothing.

    Forms say what is inside a field in brackets: `adapters[][name]`.

    Args:
        fields: what the object takes in which the name stands.
    """
    base = name.partition("[")[0]
    taken = [field for field in fields if field not in AS_EVER]
    if base in taken and base != name:
        return f"; in a form, {base!r} is one field: a list or an object is written there as JSON"
    if base not in taken and (instead := _instead(base, taken)):
        return f"; {instead}"
    others = [field for field, names in OTHER_NAMES.items() if base.lower() in names]
    meant = _meant_as(base, taken, others)
    if meant:
        return f"; did you mean {meant!r}?"
    known_elsewhere = ((field, _instead(field, taken)) for field in others)
    told = (f"; did you mean {field!r}? {what}" for field, what in known_elsewhere if what)
    return next(told, "")


def _instead(name: str, fields: list[str]) -> str:
    said = (names[name] for field, names in INSTEAD.items() if field in fields and name in names)
    return next(said, "")


def _meant_as(name: str, fields: list[str], others: list[str]) -> str | None:
    if name in fields:
        return name
    if other := next((field for field in others if field in fields), None):
        return other
    words = {w: f for f in fields for w in f.split("_") if len(w) >= SHORTEST_PART}
    return closest(name, fields, LIKENESS) or words.get(closest(name, words, LIKENESS) or "")
