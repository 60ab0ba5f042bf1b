"""Qwen-Image that edits: its text encoder sees the images as well."""

from __future__ import annotations

from typing import Any

from diffusers import (
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .family import Family, Variation, seeded
from .image_transformer_parts import SIZE, WIDTH, decoder_arguments
from .qwen_readers import QWEN_ROPE, qwen_from_text, qwen_image_components
from .reference_images import (
    LEAST_SHARING,
    REQUESTS,
    first_image,
    mask_image,
    reference_images,
)
from .vision_processors import PATCH, VisionProcessor, marked_tokenizer, vision_tokens


def small_dimensions(area: float, ratio: float) -> tuple[int, int, None]:
    """In place of about a million pixels, which the pipelines enlarge every image to."""
    return SIZE, SIZE, None


# Not attributes of a pipeline, nor arguments of its call.
pipeline_qwenimage_edit.calculate_dimensions = small_dimensions
pipeline_qwenimage_edit_inpaint.calculate_dimensions = small_dimensions
pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: (SIZE, SIZE)


def seeing_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {**decoder_arguments(), "rope_parameters": QWEN_ROPE}
    del text["head_dim"]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **vision_tokens())
    return Qwen2_5_VLForConditionalGeneration(config)


def components() -> dict[str, Any]:
    return {
        **qwen_image_components(),
        "text_encoder": seeing_text_encoder(),
        "tokenizer": marked_tokenizer(),
        "processor": VisionProcessor(),
    }


def edited(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**qwen_from_text(pipeline, variation), "image": first_image(variation)}


def edited_from_many(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**qwen_from_text(pipeline, variation), "image": reference_images(variation)}


def masked(pipeline: Any, variation: Variation) -> dict[str, Any]:
    mask = mask_image(variation)
    return {**edited(pipeline, variation), "mask_image": mask, "strength": variation.strength}


FAMILIES = (
    Family(
        "Qwen-Image-Edit",
        seeded(lambda: QwenImageEditPipeline(**components())),
        edited,
    ),
    Family(
        "Qwen-Image-Edit, inpainting",
        seeded(lambda: QwenImageEditInpaintPipeline(**components())),
        masked,
    ),
    Family(
        "Qwen-Image-Edit-Plus",
        seeded(lambda: QwenImageEditPlusPipeline(**components())),
        edited_from_many,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each",
    ),
)
