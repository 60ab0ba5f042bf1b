"""Families beside whose folder an operator lists adapters: LoRAs and IP-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ip_adapter_weights as weights
import torch
from diffusers.training_utils import _collate_lora_metadata
from families.catalogue import FAMILIES
from families.references import siglip_parts
from peft.utils import get_peft_model_state_dict
from transformers import SiglipVisionModel

from .calls import GENERATIONS, HttpCall, Input, Template, built, fill, read_folder

LORA, STYLE, FACE = "ink", "style", "face"
WEIGHTS = "ip-adapter"
PROMPT: Template = {"prompt": Input.PROMPT}


def save_with_lora(component: str, pipeline: Any, folder: Path) -> dict[str, Any]:
    """The folder of the family without a LoRA, which is built from the same seed, and the LoRA."""
    FAMILIES["Stable Diffusion"].build().save_pretrained(folder)
    module = getattr(pipeline, component)
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(module)}
    pipeline.save_lora_weights(
        folder,
        weight_name=f"{LORA}.safetensors",
        **layers,
        **_collate_lora_metadata({component: module}),
    )
    return {"adapters": {LORA: str(folder / f"{LORA}.safetensors")}}


def with_lora(component: str, scale: float | Input = Input.SCALE) -> HttpCall:
    """A scale for each request, or the same for all."""
    return HttpCall(
        GENERATIONS,
        {**PROMPT, "adapters": [{"name": LORA, "scale": scale}]},
        {**PROMPT, "cross_attention_kwargs": {"scale": scale}},
        save=partial(save_with_lora, component),
        read=built,
    )


Kind = Callable[[Any], weights.Weights]


def save_with_references(
    base: str, kinds: Mapping[str, Kind], encoder: Callable[[], Any], _: Any, folder: Path
) -> dict[str, Any]:
    """The folder of the family without IP-Adapters, and a folder for each of them."""
    pipeline = FAMILIES[base].build()
    pipeline.save_pretrained(folder)
    listed = {}
    with torch.random.fork_rng():
        for name, kind in kinds.items():
            torch.manual_seed(0)
            beside = folder / name
            weights.save_adapter(beside, kind(denoiser(pipeline)), encoder())
            listed[name] = {
                "path": str(beside),
                "image_encoder_path": str(beside / "image_encoder"),
            }
    return {"ip_adapters": listed}


def denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def read_with_references(kinds: Mapping[str, Kind], pipeline: Any, folder: Path) -> Any:
    """The folder as plain diffusers reads it, with the IP-Adapters loaded into it."""
    plain = read_folder(pipeline, folder)
    folders = [str(folder / name) for name in kinds]
    names = [f"{WEIGHTS}.safetensors"] * len(kinds)
    if hasattr(plain, "unet"):
        plain.load_ip_adapter(folders, "", names)
    elif "StableDiffusion3" in type(plain).__name__:
        own = SiglipVisionModel.from_pretrained(folder / STYLE / "image_encoder")
        plain.register_modules(**siglip_parts() | {"image_encoder": own})
        plain.load_ip_adapter(folders[0], names[0], "", image_encoder_folder=None)
    else:
        encoder = str(folder / STYLE / "image_encoder")
        plain.load_ip_adapter(
            folders[0], names[0], image_encoder_pretrained_model_name_or_path=encoder
        )
    return plain


def scale_references(scales: Any, plain: Any, inputs: Mapping[Input, Any]) -> None:
    """The scale of each adapter, or of each of its images, for all that the pipeline draws."""
    plain.set_ip_adapter_scale(fill(scales, inputs))


def reference(adapter: str, image: Input) -> Template:
    return {"adapter": adapter, "image": {"image_url": image}, "scale": Input.SCALE}


def with_references(
    base: str,
    kinds: Mapping[str, Kind],
    sent: list[Template],
    told: Template,
    scales: Any = Input.SCALE,
    encoder: Callable[[], Any] = weights.tiny_image_encoder,
) -> HttpCall:
    """Reference images, each with a scale.

    Args:
        base: the family without adapters.
        kinds: weights by name of the adapter.
        sent: references of a request.
        told: their images, as the plain pipeline takes them.
        scales: theirs, as the plain pipeline takes them.
        encoder: what looks at them.
    """
    return HttpCall(
        GENERATIONS,
        {**PROMPT, "references": sent},
        {**PROMPT, **told},
        save=partial(save_with_references, base, kinds, encoder),
        read=partial(read_with_references, kinds),
        prepare=partial(scale_references, scales),
    )


ONE = [reference(STYLE, Input.REFERENCE)]
IMAGE: Template = {"ip_adapter_image": [Input.REFERENCE]}
OF_A_UNET: Mapping[str, Kind] = {STYLE: weights.unet_weights}
SECOND, SCALE = Input.SECOND_REFERENCE, Input.SCALE
# With a mask for each of its images an adapter looks at each by itself, with a scale of its own.
EVERYWHERE = {"ip_adapter_masks": [torch.ones(1, 2, 16, 16)]}

REACHES = {
    "FLUX with an IP-Adapter": with_references("FLUX", {STYLE: weights.flux_weights}, ONE, IMAGE),
    "Stable Diffusion 3 with an IP-Adapter": with_references(
        "Stable Diffusion 3",
        {STYLE: weights.sd3_weights},
        ONE,
        IMAGE,
        encoder=weights.tiny_siglip,
    ),
    "Stable Diffusion XL with an IP-Adapter": with_references(
        "Stable Diffusion XL", OF_A_UNET, ONE, IMAGE
    ),
    "Stable Diffusion with a LoRA of the UNet": with_lora("unet", 0.7),
    "Stable Diffusion with a LoRA of the UNet, a scale a request": with_lora("unet"),
    "Stable Diffusion with a LoRA of the text encoder, a scale a request": with_lora(
        "text_encoder"
    ),
    "Stable Diffusion with an IP-Adapter": with_references(
        "Stable Diffusion", OF_A_UNET, ONE, IMAGE
    ),
    "Stable Diffusion with an IP-Adapter, several references": with_references(
        "Stable Diffusion",
        OF_A_UNET,
        [*ONE, reference(STYLE, SECOND)],
        {
            "ip_adapter_image": [[Input.REFERENCE, SECOND]],
            "cross_attention_kwargs": EVERYWHERE,
        },
        [[SCALE, SCALE]],
    ),
    "Stable Diffusion with two IP-Adapters": with_references(
        "Stable Diffusion",
        {**OF_A_UNET, FACE: weights.unet_plus_weights},
        [*ONE, reference(FACE, SECOND)],
        {"ip_adapter_image": [Input.REFERENCE, SECOND]},
        [SCALE, SCALE],
    ),
}
