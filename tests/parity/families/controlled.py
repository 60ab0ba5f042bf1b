"""Images that steer the denoiser through a network of their own: ControlNets and T2I-Adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)

from families.family import Family, Variation, seeded
from families.unet_parts import (
    CHANNELS,
    SCHEDULERS,
    SIDE,
    WIDTH,
    XL_SETTINGS,
    fill_zeros,
    relative_output,
    sd_components,
    text_to_image,
    xl_components,
)


def tiny_controlnet(**changes: Any) -> ControlNetModel:
    settings: dict[str, Any] = {
        "block_out_channels": CHANNELS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16),
    }
    network = ControlNetModel(**settings | changes)
    fill_zeros(network, 0.5)
    return network


def build_xl_controlnet() -> StableDiffusionXLControlNetPipeline:
    settings = {name: value for name, value in XL_SETTINGS.items() if name != "up_block_types"}
    return StableDiffusionXLControlNetPipeline(
        **xl_components(), controlnet=tiny_controlnet(**settings)
    )


def build_adapter() -> StableDiffusionAdapterPipeline:
    adapter = T2IAdapter(channels=list(CHANNELS), num_res_blocks=1, downscale_factor=2)
    return StableDiffusionAdapterPipeline(**sd_components(), adapter=adapter)


def with_control(networks: int, pipeline: Any, variation: Variation) -> dict[str, Any]:
    images = list(variation.tensor(networks, 1, 3, SIDE, SIDE))
    return text_to_image(pipeline, variation) | {
        "image": images if networks > 1 else images[0],
        "controlnet_conditioning_scale": [0.9, 0.6][:networks] if networks > 1 else 0.8,
    }


def with_adapter(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = variation.tensor(1, 3, SIDE, SIDE)
    # For anything but files and latents the pipeline calls a method that warns it will go.
    return text_to_image(pipeline, variation) | {"image": image, "output_type": "latent"}


FAMILIES = (
    Family(
        "Stable Diffusion with a ControlNet",
        seeded(
            lambda: StableDiffusionControlNetPipeline(
                **sd_components(), controlnet=tiny_controlnet()
            )
        ),
        partial(with_control, 1),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion with two ControlNets",
        seeded(
            lambda: StableDiffusionControlNetPipeline(
                **sd_components(), controlnet=[tiny_controlnet(), tiny_controlnet()]
            )
        ),
        partial(with_control, 2),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion XL with a ControlNet",
        seeded(build_xl_controlnet),
        partial(with_control, 1),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion with a T2I-Adapter",
        seeded(build_adapter),
        with_adapter,
        denoiser="unet",
        schedulers=SCHEDULERS,
        result=relative_output,
        remark="latents are compared: the pipeline gives no tensor of an image",
    ),
)
