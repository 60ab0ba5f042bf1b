"""ControlNets of image transformers: FLUX union, Qwen-Image, Hunyuan-DiT and Sana."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    HunyuanDiT2DControlNetModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
)

from . import flow_transformers, flux, pixart, qwen_readers
from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    WIDTH,
    SharpVAE,
    old_position_embedding,
    start_image,
    without_zeros,
)


@old_position_embedding()
def flux_union() -> FluxControlNetModel:
    return without_zeros(FluxControlNetModel(num_mode=4, **flux.blocks()))


def with_mode(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return flux.controlled(pipeline, variation) | {"control_mode": 2}


def qwen_controlnet() -> QwenImageControlNetModel:
    return without_zeros(
        QwenImageControlNetModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        )
    )


def qwen_controlled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return qwen_readers.qwen_from_text(pipeline, variation) | {
        "control_image": start_image(variation),
        "controlnet_conditioning_scale": 0.5 + 0.1 * variation.index,
    }


def settings_of(transformer: Any, network: type) -> dict[str, Any]:
    """What a ControlNet has in common with the transformer that it steers."""
    taken = inspect.signature(network).parameters
    return {name: value for name, value in transformer.config.items() if name in taken}


def deep_hunyuan() -> HunyuanDiTPipeline:
    """Fewer blocks have no connection that skips some, which is where a ControlNet steers."""
    return pixart.hunyuan(4, SharpVAE)


def hunyuan_controlnet() -> HunyuanDiT2DControlNetModel:
    settings = settings_of(deep_hunyuan().transformer, HunyuanDiT2DControlNetModel)
    return without_zeros(HunyuanDiT2DControlNetModel(**settings, transformer_num_layers=4))


def hunyuan() -> HunyuanDiTControlNetPipeline:
    return HunyuanDiTControlNetPipeline(
        **deep_hunyuan().components,
        controlnet=hunyuan_controlnet(),
        requires_safety_checker=False,
    )


def sana_controlnet() -> SanaControlNetModel:
    settings = settings_of(flow_transformers.sana_transformer(), SanaControlNetModel)
    return without_zeros(SanaControlNetModel(**settings | {"num_layers": 1}))


def sana() -> SanaControlNetPipeline:
    return SanaControlNetPipeline(
        **flow_transformers.sana().components, controlnet=sana_controlnet()
    )


def hunyuan_controlled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return pixart.hunyuan_from_text(pipeline, variation) | {
        "control_image": start_image(variation),
        "controlnet_conditioning_scale": 0.5 + 0.1 * variation.index,
    }


def sana_controlled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return flow_transformers.sana_from_text(pipeline, variation) | {
        "control_image": variation.tensor(1, 3, 2 * SIZE, 2 * SIZE),
        "controlnet_conditioning_scale": 0.5 + 0.1 * variation.index,
    }


FAMILIES = (
    Family(
        "FLUX with a union ControlNet",
        seeded(lambda: FluxControlNetPipeline(controlnet=flux_union(), **flux.components())),
        with_mode,
    ),
    Family(
        "Qwen-Image with a ControlNet",
        seeded(
            lambda: QwenImageControlNetPipeline(
                controlnet=qwen_controlnet(), **qwen_readers.qwen_image_components()
            )
        ),
        qwen_controlled,
    ),
    Family(
        "Hunyuan-DiT with a ControlNet",
        seeded(hunyuan),
        hunyuan_controlled,
        # Parts of it are in float32 whatever the dtype: 2e-6 with so many blocks.
        float64=False,
        remark="it samples the VAE's posterior without the request's generator",
    ),
    Family("Sana with a ControlNet", seeded(sana), sana_controlled),
)
