"""IP-Adapters: each request with references and scales of its own, or without any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ip_adapter_weights as weights
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules
from stepserve.pipelines.references.adapters import Reference, ReferenceAdapters, hold_references
from transformers import CLIPImageProcessor, SiglipImageProcessor

from families import flux, stable_diffusion_3, unet_parts
from families.family import Family, Variation, seeded

NAMES = ("style", "face")
# Of the four requests of a family one has no reference.
SCALES: tuple[tuple[float, ...], ...] = ((0.7,), (), (1.0,), (0.4,))
# One has two references of one adapter, one has one of each.
SCALES_OF_TWO = ((0.7, 0.3), (0.5, 0.0), (1.0,), ())
Arguments = Callable[[Any, Variation], dict[str, Any]]
HELD = "_held_references"


def clip_parts() -> dict[str, Any]:
    size = weights.IMAGE_PX
    return {
        "image_encoder": weights.tiny_image_encoder(),
        "feature_extractor": CLIPImageProcessor(size=size, crop_size=size),
    }


def siglip_parts() -> dict[str, Any]:
    size = {"height": weights.IMAGE_PX, "width": weights.IMAGE_PX}
    return {
        "image_encoder": weights.tiny_siglip(),
        "feature_extractor": SiglipImageProcessor(size=size),
    }


def hold(pipeline: Any, count: int) -> Any:
    """Make a pipeline with that many adapters take scales by request."""
    adapters = hold_references(pipeline, NAMES[:count])
    wrap_modules(pipeline, Wrappers(reference_scales=adapters.wrap))
    vars(pipeline)[HELD] = adapters
    return pipeline


def with_unet(cls: Any, components: dict[str, Any], kinds: list[Any]) -> Any:
    pipeline = cls(**components | clip_parts())
    adapters = [kind(pipeline.unet) for kind in kinds]
    pipeline.load_ip_adapter(adapters, "", [""] * len(adapters), image_encoder_folder=None)
    return hold(pipeline, len(adapters))


def with_flux() -> Any:
    pipeline = FluxPipeline(**flux.components() | clip_parts())
    pipeline.load_ip_adapter(
        weights.flux_weights(pipeline.transformer),
        "",
        image_encoder_pretrained_model_name_or_path=None,
    )
    return hold(pipeline, 1)


def with_stable_diffusion_3() -> Any:
    pipeline = StableDiffusion3Pipeline(**stable_diffusion_3.components() | siglip_parts())
    pipeline.load_ip_adapter(weights.sd3_weights(pipeline.transformer), image_encoder_folder=None)
    return hold(pipeline, 1)


def image_of(variation: Variation, index: int) -> Image.Image:
    """A reference of its own for each request."""
    values = variation.tensor(2, weights.IMAGE_PX, weights.IMAGE_PX, 3)[index]
    return Image.fromarray((255 * values).byte().numpy())


def referring(
    arguments: Arguments,
    scales: tuple[tuple[float, ...], ...],
    names: tuple[str, ...],
    pipeline: Any,
    variation: Variation,
) -> dict[str, Any]:
    """A request whose references take turns with the adapters."""
    adapters: ReferenceAdapters = vars(pipeline)[HELD]
    references = [
        Reference(image_of(variation, index), scale, names[index % len(names)])
        for index, scale in enumerate(scales[variation.index % len(scales)])
    ]
    own = arguments(pipeline, variation)
    return own | adapters.attach(pipeline, references, variation.guidance_scale)


REMARK = "a scale for each request, one of which has no reference"

FAMILIES = (
    Family(
        "Stable Diffusion with an IP-Adapter",
        seeded(
            lambda: with_unet(
                StableDiffusionPipeline, unet_parts.sd_components(), [weights.unet_weights]
            )
        ),
        partial(referring, unet_parts.text_to_image, SCALES, NAMES[:1]),
        denoiser="unet",
        schedulers=unet_parts.SCHEDULERS,
        remark=REMARK,
    ),
    Family(
        "Stable Diffusion with two IP-Adapters",
        seeded(
            lambda: with_unet(
                StableDiffusionPipeline,
                unet_parts.sd_components(),
                [weights.unet_weights, weights.unet_plus_weights],
            )
        ),
        partial(referring, unet_parts.text_to_image, SCALES_OF_TWO, NAMES),
        denoiser="unet",
        schedulers=unet_parts.SCHEDULERS,
        remark="a scale for each reference; some requests have one of each adapter",
    ),
    Family(
        "Stable Diffusion with an IP-Adapter, several references",
        seeded(
            lambda: with_unet(
                StableDiffusionPipeline, unet_parts.sd_components(), [weights.unet_weights]
            )
        ),
        partial(referring, unet_parts.text_to_image, SCALES_OF_TWO, NAMES[:1]),
        denoiser="unet",
        schedulers=unet_parts.SCHEDULERS,
        least_sharing=1.2,
        remark="requests share where none or all have several",
    ),
    Family(
        "Stable Diffusion XL with an IP-Adapter",
        seeded(
            lambda: with_unet(
                StableDiffusionXLPipeline, unet_parts.xl_components(), [weights.unet_weights]
            )
        ),
        partial(referring, unet_parts.text_to_image, SCALES, NAMES[:1]),
        denoiser="unet",
        schedulers=unet_parts.SCHEDULERS,
        remark=REMARK,
    ),
    Family(
        "FLUX with an IP-Adapter",
        seeded(with_flux),
        partial(referring, flux.from_text, SCALES, NAMES[:1]),
        remark=REMARK,
    ),
    Family(
        "Stable Diffusion 3 with an IP-Adapter",
        seeded(with_stable_diffusion_3),
        partial(referring, stable_diffusion_3.from_text, SCALES, NAMES[:1]),
        remark=REMARK,
    ),
)
