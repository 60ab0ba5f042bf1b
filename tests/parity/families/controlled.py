"""Images that steer the denoiser through a network of their own: ControlNets and T2I-Adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
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
    image_to_image,
    inpainting,
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


def tiny_union() -> ControlNetUnionModel:
    """Several kinds of control in one network."""
    settings = {name: value for name, value in XL_SETTINGS.items() if name != "up_block_types"}
    network = ControlNetUnionModel(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
        num_control_type=6,
        num_trans_channel=CHANNELS[0],
        num_trans_head=2,
        num_proj_channel=CHANNELS[0],
        **settings,
    )
    fill_zeros(network, 0.5)
    return network


def tiny_adapter(**changes: Any) -> T2IAdapter:
    settings: dict[str, Any] = {
        "channels": list(CHANNELS),
        "num_res_blocks": 1,
        "downscale_factor": 2,
    }
    return T2IAdapter(**settings | changes)


def build_xl_controlnet() -> StableDiffusionXLControlNetPipeline:
    settings = {name: value for name, value in XL_SETTINGS.items() if name != "up_block_types"}
    return StableDiffusionXLControlNetPipeline(
        **xl_components(), controlnet=tiny_controlnet(**settings)
    )


def build_adapter() -> StableDiffusionAdapterPipeline:
    return StableDiffusionAdapterPipeline(**sd_components(), adapter=tiny_adapter())


def tiny_xl_adapter() -> T2IAdapter:
    return tiny_adapter(
        adapter_type="full_adapter_xl", channels=[16, 32, 32, 32], downscale_factor=4
    )


def build_xl_adapter() -> StableDiffusionXLAdapterPipeline:
    components = xl_components()
    del components["add_watermarker"]
    return StableDiffusionXLAdapterPipeline(**components, adapter=tiny_xl_adapter())


def with_control(networks: int, pipeline: Any, variation: Variation) -> dict[str, Any]:
    # Of two networks that run in one forward, scales are what requests must have in common.
    scales = [0.9, 0.6] if networks > 1 else [0.5 + 0.1 * variation.index]
    images = list(variation.tensor(networks, 1, 3, SIDE, SIDE))
    return text_to_image(pipeline, variation) | {
        "image": images if networks > 1 else images[0],
        "controlnet_conditioning_scale": scales[:networks] if networks > 1 else scales[0],
    }


def controlled_task(request: Any, pipeline: Any, variation: Variation) -> dict[str, Any]:
    """A request that begins with an image, and is steered by another."""
    control = 1 - variation.tensor(1, 3, SIDE, SIDE)
    scale = {"controlnet_conditioning_scale": 0.8}
    return request(pipeline, variation) | {"control_image": control} | scale


def with_union(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_to_image(pipeline, variation) | {
        "control_image": [variation.tensor(1, 3, SIDE, SIDE)],
        "control_mode": [3],
        "controlnet_conditioning_scale": 0.8,
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
        "Stable Diffusion with a ControlNet, image to image",
        seeded(
            lambda: StableDiffusionControlNetImg2ImgPipeline(
                **sd_components(), controlnet=tiny_controlnet()
            )
        ),
        partial(controlled_task, image_to_image),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion with a ControlNet, inpainting",
        seeded(
            lambda: StableDiffusionControlNetInpaintPipeline(
                **sd_components(), controlnet=tiny_controlnet()
            )
        ),
        partial(controlled_task, inpainting),
        denoiser="unet",
        schedulers=SCHEDULERS,
    ),
    Family(
        "Stable Diffusion XL with a union ControlNet",
        seeded(
            lambda: StableDiffusionXLControlNetUnionPipeline(
                **xl_components(), controlnet=tiny_union()
            )
        ),
        with_union,
        denoiser="unet",
        schedulers=SCHEDULERS,
        # Of each step, the UNet's forward is shared.
        least_sharing=1.4,
        remark="the ControlNet's attention runs over the rows of a batch: its calls run alone",
    ),
    Family(
        "Stable Diffusion XL with a T2I-Adapter",
        seeded(build_xl_adapter),
        with_adapter,
        denoiser="unet",
        schedulers=SCHEDULERS,
        result=relative_output,
        remark="latents are compared: the pipeline gives no tensor of an image",
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
