"""What two mixed requests ask for: as bodies, and as calls of the plain pipeline."""

from __future__ import annotations

import base64
import inspect
import io
import json
from dataclasses import replace
from typing import Any

import torch
from families.family import NEGATIVE_PROMPT, Variation
from families.reference_images import mask_image, reference_images
from PIL import Image
from stepserve.pipelines.facts.guiders import GUIDER_SCALE, set_guidance_scale

from .calls import Input, fill
from .service import MODEL, ServedFamily

FEWEST_STEPS = 3
REFERENCE_PX = 32


def variations_of(served: ServedFamily) -> list[Variation]:
    """Two requests that differ in seed, prompt, steps, guidance and strength."""
    return served.family.variations(2)


def steps_of(served: ServedFamily, variation: Variation) -> int:
    """Its steps: a few, or as many as the model can do."""
    limits = served.runner.capabilities()
    return limits.steps_of(limits.default_scheduler).nearest(FEWEST_STEPS + variation.index)


def body_of(served: ServedFamily, variation: Variation) -> dict[str, Any]:
    """What a client sends."""
    limits = served.runner.capabilities()
    side_px = limits.sizes.native
    inputs = inputs_of(variation, side_px)
    as_sent = {name: _sent(value) for name, value in inputs.items()}
    body = {
        "model": MODEL,
        "size": f"{side_px}x{side_px}",
        "seed": variation.seed,
        "num_inference_steps": steps_of(served, variation),
        **fill(served.reach.body, as_sent),
    }
    if limits.guidance.argument:
        body["guidance_scale"] = variation.guidance_scale
    if limits.guidance.negative_prompt:
        body["negative_prompt"] = NEGATIVE_PROMPT
    return body


def plain_image(served: ServedFamily, variation: Variation, index: int = 0) -> Image.Image:
    """What diffusers makes when it is told the same.

    Args:
        index: which image of the request, each of which has a seed of its own.
    """
    limits = served.runner.capabilities()
    side_px = limits.sizes.native
    inputs = inputs_of(variation, side_px)
    served.reach.prepare(served.plain, inputs)
    wanted = {
        "width": side_px,
        "height": side_px,
        "num_inference_steps": steps_of(served, variation),
        "generator": torch.Generator("cpu").manual_seed(variation.seed + index),
        **fill(served.reach.arguments, inputs),
        **served.besides,
    }
    if limits.guidance.argument == GUIDER_SCALE:
        set_guidance_scale(served.plain, variation.guidance_scale)
    elif limits.guidance.argument:
        wanted[limits.guidance.argument] = variation.guidance_scale
    if limits.guidance.negative_prompt:
        wanted["negative_prompt"] = NEGATIVE_PROMPT
    taken = inspect.signature(type(served.plain).__call__).parameters
    arguments = {name: value for name, value in wanted.items() if name in taken}
    image: Image.Image = served.plain(**arguments)[0][0]
    return image


def inputs_of(variation: Variation, side_px: int) -> dict[Input, Any]:
    """The values of all inputs."""
    three = replace(variation, index=2)
    image, second, control = reference_images(three, side_px)
    return {
        Input.PROMPT: variation.prompt,
        Input.EDIT_IN_JSON: json.dumps({"edit_instruction": variation.prompt}),
        Input.IMAGE: image,
        Input.SECOND_IMAGE: second,
        Input.MASK: mask_image(variation, side_px),
        Input.STRENGTH: variation.strength,
        Input.CLASS_LABEL: 1 + variation.index,
        Input.IMAGE_GUIDANCE: 1.5 + 0.5 * variation.index,
        Input.CONTROL: control,
        Input.SECOND_CONTROL: second,
        Input.REFERENCE: image.resize((REFERENCE_PX, REFERENCE_PX)),
        Input.SECOND_REFERENCE: second.resize((REFERENCE_PX, REFERENCE_PX)),
        Input.SCALE: 0.9 - 0.3 * variation.index,
    }


def _sent(value: Any) -> Any:
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
