"""Perturbed-attention guidance: some of a request's rows attend in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    HunyuanDiTPAGPipeline,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from stepserve.pipelines.modules.perturbed_rows import hold_perturbed_rows
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules

from . import flow_transformers, pixart, stable_diffusion_3, unet_parts
from .family import Family, Variation, seeded

# Requests with and without perturbed rows, and with and without a negative prompt's, share.
PAG_SCALES = (2.0, 0.0, 4.0, 3.0)
GUIDANCE_SCALES = (5.0, 3.0, 1.0, 7.5)
REMARK = "which rows are perturbed travels with the call"

Arguments = Callable[[Any, Variation], dict[str, Any]]


def held(build: Callable[[], Any]) -> Callable[[], Any]:
    """As a server loads it: with processors that perturb row by row."""

    def built() -> Any:
        pipeline = build()
        wrap_modules(pipeline, Wrappers(perturbed_rows=hold_perturbed_rows(pipeline)))
        return pipeline

    return seeded(built)


def perturbed(arguments: Arguments) -> Arguments:
    def with_scale(pipeline: Any, variation: Variation) -> dict[str, Any]:
        scale = PAG_SCALES[variation.index % len(PAG_SCALES)]
        return arguments(pipeline, variation) | {"pag_scale": scale}

    return with_scale


def hunyuan_dit() -> HunyuanDiTPAGPipeline:
    components = dict(pixart.hunyuan().components)
    return HunyuanDiTPAGPipeline(
        **components, requires_safety_checker=False, pag_applied_layers="blocks.1"
    )


def sana() -> SanaPAGPipeline:
    components = flow_transformers.sana().components
    return SanaPAGPipeline(**components, pag_applied_layers="transformer_blocks.0")


def sd() -> StableDiffusionPAGPipeline:
    return StableDiffusionPAGPipeline(**unet_parts.sd_components(pag_applied_layers="mid"))


def sd_3() -> StableDiffusion3PAGPipeline:
    components = stable_diffusion_3.components()
    return StableDiffusion3PAGPipeline(**components, pag_applied_layers="blocks.1")


def sigma() -> PixArtSigmaPAGPipeline:
    return PixArtSigmaPAGPipeline(**pixart.pixart_components(), pag_applied_layers="blocks.1")


AS_DIFFUSERS_HAS_THEM: dict[str, Callable[[], Any]] = {
    "Hunyuan-DiT": hunyuan_dit,
    "PixArt-sigma": sigma,
    "Sana": sana,
    "Stable Diffusion": sd,
    "Stable Diffusion 3": sd_3,
    "Stable Diffusion XL": lambda: StableDiffusionXLPAGPipeline(**unet_parts.xl_components()),
}


def family(base: str, arguments: Arguments, **more: Any) -> Family:
    settings = {"guidance_scales": GUIDANCE_SCALES, "remark": REMARK, **more}
    return Family(
        name_of(base), held(AS_DIFFUSERS_HAS_THEM[base]), perturbed(arguments), **settings
    )


def name_of(base: str) -> str:
    return f"{base} with perturbed-attention guidance"


UNET = {"denoiser": "unet", "schedulers": unet_parts.SCHEDULERS}
FAMILIES = (
    family("Stable Diffusion", unet_parts.text_to_image, **UNET),
    family("Stable Diffusion XL", unet_parts.text_to_image, **UNET),
    family("Stable Diffusion 3", stable_diffusion_3.from_text),
    family("PixArt-sigma", pixart.pixart_from_text, schedulers=pixart.PIXART_SCHEDULERS),
    family("Sana", flow_transformers.sana_from_text),
    # Without guidance of the usual kind diffusers' own call raises.
    family("Hunyuan-DiT", pixart.hunyuan_from_text, guidance_scales=(5.0, 3.0, 4.0, 7.5)),
)
