"""Families that are steered: an operator lists networks beside the folder of the base model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from .calls import EDITS, GENERATIONS, HttpCall, Input, Template, built

NETWORKS = ("controlnet", "adapter")
NAMES = ("first", "second")
PROMPT: Template = {"prompt": Input.PROMPT}
CONTROLNET, ADAPTER = "controlnet_conditioning_scale", "adapter_conditioning_scale"


def save_base(base: str, mode: int | None, pipeline: Any, folder: Path) -> dict[str, Any]:
    """The folder of the pipeline without networks, and a folder for each of these."""
    cls = getattr(diffusers, base)
    taken = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipeline.components.items() if name in taken}
    if "requires_safety_checker" in taken:
        parts["requires_safety_checker"] = False
    cls(**parts).save_pretrained(folder)
    listed = {}
    for name, network in zip(NAMES, networks_of(pipeline), strict=False):
        path = folder.parent / f"{folder.name}-{name}"
        network.save_pretrained(path)
        listed[name] = {"path": str(path), "mode": mode}
    return {"controls": listed}


def networks_of(pipeline: Any) -> Sequence[Any]:
    """One, or those that are joined."""
    joined = next(getattr(pipeline, name) for name in NETWORKS if hasattr(pipeline, name))
    return list(getattr(joined, "nets", [joined]))


def control(name: str, image: Input, scale: Any = Input.SCALE) -> dict[str, Any]:
    return {"name": name, "image": {"image_url": image}, "scale": scale}


def steered(
    base: str,
    told: str,
    scale: str = CONTROLNET,
    mode: int | None = None,
    more: tuple[Template, Template] = ({}, {}),
) -> HttpCall:
    """One control, whose scale differs from request to request.

    Args:
        base: class of the model without networks.
        told: what the plain pipeline takes the image that steers as.
        scale: what it takes the scale as.
        mode: of a union network.
        more: what the body has besides, and the plain call.
    """
    modes: Template = {} if mode is None else {"control_mode": mode}
    return HttpCall(
        EDITS if more[0] else GENERATIONS,
        {**PROMPT, **more[0], "controls": [control(NAMES[0], Input.CONTROL)]},
        {**PROMPT, **more[1], told: Input.CONTROL, scale: Input.SCALE, **modes},
        save=partial(save_base, base, mode),
        read=built,
    )


def in_lists(call: HttpCall, *names: str) -> HttpCall:
    """Told the same, where the plain pipeline takes lists."""
    arguments = {n: [v] if n in names else v for n, v in call.arguments.items()}
    return HttpCall(call.url, call.body, arguments, save=call.save, read=call.read)


def steered_twice(base: str, scales: Sequence[float]) -> HttpCall:
    """Two controls, which run in one forward: requests share where their scales are equal."""
    images = (Input.CONTROL, Input.SECOND_CONTROL)
    controls = [control(*each) for each in zip(NAMES, images, scales, strict=True)]
    return HttpCall(
        GENERATIONS,
        {**PROMPT, "controls": controls},
        {**PROMPT, "image": list(images), CONTROLNET: list(scales)},
        save=partial(save_base, base, None),
        read=built,
    )


IMAGE: Mapping[str, Any] = {"image": {"image_url": Input.IMAGE}, "strength": Input.STRENGTH}
TOLD_IMAGE: Mapping[str, Any] = {"image": Input.IMAGE, "strength": Input.STRENGTH}
FROM_IMAGE = (IMAGE, TOLD_IMAGE)
REPAINTED = (
    {**IMAGE, "mask": {"image_url": Input.MASK}},
    {**TOLD_IMAGE, "mask_image": Input.MASK},
)
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"

REACHES = {
    "FLUX Control": HttpCall(
        GENERATIONS,
        {**PROMPT, "controls": [{"image": {"image_url": Input.CONTROL}}]},
        {**PROMPT, "control_image": Input.CONTROL},
    ),
    "FLUX with a ControlNet": steered("FluxPipeline", "control_image"),
    "FLUX with a union ControlNet": steered("FluxPipeline", "control_image", mode=2),
    "Hunyuan-DiT with a ControlNet": steered("HunyuanDiTPipeline", "control_image"),
    "Qwen-Image with a ControlNet": steered("QwenImagePipeline", "control_image"),
    "Sana with a ControlNet": steered("SanaPipeline", "control_image"),
    "Stable Diffusion 3 with a ControlNet": steered("StableDiffusion3Pipeline", "control_image"),
    "Stable Diffusion XL with a ControlNet": steered(XL, "image"),
    "Stable Diffusion XL with a T2I-Adapter": steered(XL, "image", ADAPTER),
    "Stable Diffusion XL with a union ControlNet": in_lists(
        steered(XL, "control_image", mode=3), "control_image", "control_mode"
    ),
    "Stable Diffusion with a ControlNet": steered(SD, "image"),
    "Stable Diffusion with a ControlNet, image to image": steered(
        "StableDiffusionImg2ImgPipeline", "control_image", more=FROM_IMAGE
    ),
    "Stable Diffusion with a ControlNet, inpainting": steered(
        "StableDiffusionInpaintPipeline", "control_image", more=REPAINTED
    ),
    "Stable Diffusion with a T2I-Adapter": steered(SD, "image", ADAPTER),
    "Stable Diffusion with two ControlNets": steered_twice(SD, (0.9, 0.6)),
}
