"""Image transformers that keep keys and values of what does not change from step to step."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .family import NEGATIVE_PROMPT, Family, Variation, seeded
from .flux import CHAT_TEMPLATE, flux_2_components, flux_2_from_text
from .image_transformer_parts import (
    WIDTH,
    decoder_arguments,
    start_image,
    text_arguments,
    with_stronger_blocks,
)
from .tokenizers import VOCABULARY, word_tokenizer

LEAST_PX = 64
"""The smallest side that the pipelines of FLUX.2 take of a reference image."""
QWEN_21_SIZE = 32
"""Its pipeline takes its VAE for one that divides by sixteen, and latents two by two."""
VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SYSTEM_TEMPLATE = "{{ messages[0].content[0].text }}"
QWEN_3_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}


def klein_kv() -> Flux2KleinKVPipeline:
    components = flux_2_components(guidance_embeds=False)
    with_stronger_blocks(components["transformer"])
    return Flux2KleinKVPipeline(
        **components,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**decoder_arguments())),
        tokenizer=word_tokenizer(chat_template=CHAT_TEMPLATE),
    )


def reference(variation: Variation, side_px: int) -> Image.Image:
    """An image of its own, as pipelines take it that read its size."""
    pixels = (start_image(variation)[0] * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side_px, side_px))


def klein_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = flux_2_from_text(pipeline, variation)
    del arguments["guidance_scale"]
    return arguments


def klein_edit(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """The first step has the reference's tokens; later ones its keys and values."""
    return {**klein_from_text(pipeline, variation), "image": reference(variation, LEAST_PX)}


def qwen_3_vl() -> Qwen3VLForConditionalGeneration:
    text = {**decoder_arguments(), "rope_parameters": QWEN_3_ROPE}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    ids = dict(zip(VISION_TOKENS, vision_token_ids(), strict=True))
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config)


def vision_tokenizer() -> Any:
    return word_tokenizer(256, end=False, additional_special_tokens=list(VISION_TOKENS))


def vision_token_ids() -> list[int]:
    ids: list[int] = vision_tokenizer().convert_tokens_to_ids(list(VISION_TOKENS))
    assert max(ids) < VOCABULARY
    return ids


class WithoutVideos(Qwen3VLProcessor):
    """The real one without its processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def qwen_3_vl_processor() -> Qwen3VLProcessor:
    # An area: one token for so many pixels.
    size = {"shortest_edge": QWEN_21_SIZE**2, "longest_edge": QWEN_21_SIZE**2}
    return WithoutVideos(
        image_processor=Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size),
        tokenizer=vision_tokenizer(),
        video_processor=None,
        chat_template=SYSTEM_TEMPLATE,
    )


def qwen_image_21() -> QwenImage21Pipeline:
    channels = 4
    return QwenImage21Pipeline(
        transformer=with_stronger_blocks(
            QwenImage21Transformer2DModel(
                in_channels=channels,
                out_channels=channels,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=WIDTH,
                axes_dims_rope=(8, 4, 4),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False] * 4,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        text_encoder=qwen_3_vl(),
        processor=qwen_3_vl_processor(),
    )


def qwen_21_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = text_arguments(
        variation,
        guidance_scale=None,
        negative_prompt=NEGATIVE_PROMPT,
        height=QWEN_21_SIZE,
        width=QWEN_21_SIZE,
    )
    return {**arguments, "true_cfg_scale": variation.guidance_scale}


def qwen_21_edit(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **qwen_21_from_text(pipeline, variation),
        "image": reference(variation, QWEN_21_SIZE),
        "output_resolution": QWEN_21_SIZE,
    }


FAMILIES = (
    Family("FLUX.2 Klein with a key-value cache", seeded(klein_kv), klein_from_text),
    Family(
        "FLUX.2 Klein with a key-value cache, edit",
        seeded(klein_kv),
        klein_edit,
        remark="keys and values of the reference image are joined by row",
    ),
    Family(
        "Qwen-Image 2.1",
        seeded(qwen_image_21),
        qwen_21_from_text,
        remark="keys and values of the prompt are joined by row",
    ),
    Family(
        "Qwen-Image 2.1, edit",
        seeded(qwen_image_21),
        qwen_21_edit,
        remark="keys and values of prompt and reference image are joined by row",
    ),
)
