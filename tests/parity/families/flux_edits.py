"""FLUX in the forms that edit: Kontext with a mask, and FLUX.2 with reference images."""

from __future__ import annotations

from typing import Any

from diffusers import (
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    FluxKontextInpaintPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext, pipeline_flux_kontext_inpaint

from .family import Family, Variation, seeded
from .flux import components, flux_2, flux_2_from_text, flux_2_klein, from_text
from .image_transformer_parts import SIZE, with_stronger_blocks
from .reference_images import (
    LEAST_SHARING,
    REQUESTS,
    first_image,
    mask_image,
    reference_images,
)

# One of which every image is resized to. Not an attribute of a pipeline, nor an argument.
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(SIZE, SIZE)]
pipeline_flux_kontext_inpaint.PREFERRED_KONTEXT_RESOLUTIONS = [(SIZE, SIZE)]

SMALLEST = 64
"""FLUX.2 looks at no smaller images, in pixels."""


def masked_in_context(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **from_text(pipeline, variation),
        "image": first_image(variation),
        "mask_image": mask_image(variation),
        "strength": variation.strength,
        "max_area": SIZE * SIZE,
    }


def with_references(pipeline: Any, variation: Variation) -> dict[str, Any]:
    images = reference_images(variation, SMALLEST)
    return {**flux_2_from_text(pipeline, variation), "image": images}


def masked(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """Some with a second image to look at."""
    image, *others = reference_images(variation)
    return {
        **flux_2_from_text(pipeline, variation),
        "image": image,
        "image_reference": others[:1] or None,
        "mask_image": mask_image(variation),
        "strength": variation.strength,
    }


def kontext_inpainting() -> FluxKontextInpaintPipeline:
    return FluxKontextInpaintPipeline(**components())


def klein_with_references() -> Flux2KleinPipeline:
    pipeline = flux_2_klein()
    with_stronger_blocks(pipeline.transformer)
    return pipeline


def klein_inpainting() -> Flux2KleinInpaintPipeline:
    return Flux2KleinInpaintPipeline(**flux_2_klein().components)


FAMILIES = (
    Family("FLUX Kontext, inpainting", seeded(kontext_inpainting), masked_in_context),
    Family(
        "FLUX.2, with reference images",
        seeded(flux_2),
        with_references,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each",
    ),
    Family(
        "FLUX.2 Klein, with reference images",
        seeded(klein_with_references),
        with_references,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each",
    ),
    Family(
        "FLUX.2 Klein, inpainting",
        seeded(klein_inpainting),
        masked,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="with a second image or without",
    ),
)
