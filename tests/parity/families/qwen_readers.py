"""Flow-matching image transformers whose prompts are read by a Qwen."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    decoder_arguments,
    mask,
    shifted_vae,
    start_image,
    text_arguments,
    tiny_clip,
    without_zeros,
)
from .tokenizers import clip_tokenizer, word_tokenizer

CHAT_TEMPLATE = "user : {{ messages[0].content }}"
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


def from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(variation, max_sequence_length=TOKENS)


def with_image(arguments: dict[str, Any], variation: Variation) -> dict[str, Any]:
    return {**arguments, "image": start_image(variation), "strength": variation.strength}


def tiny_qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {**decoder_arguments(), "rope_parameters": QWEN_ROPE}
    del text["head_dim"]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_qwen() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**decoder_arguments()))


def tiny_qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 0.5, 1.0],
    )


def qwen_image_components() -> dict[str, Any]:
    return {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": tiny_qwen_vae(),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": word_tokenizer(),
    }


def qwen_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """Prompts are not padded: equally many words make equally many tokens."""
    arguments = text_arguments(variation, guidance_scale=None, max_sequence_length=TOKENS)
    return {**arguments, "true_cfg_scale": variation.guidance_scale}


def qwen_from_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return with_image(qwen_from_text(pipeline, variation), variation)


def qwen_masked(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**qwen_from_image(pipeline, variation), "mask_image": mask(variation)}


def z_image_components() -> dict[str, Any]:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        # Left as whatever the memory held.
        torch.nn.init.normal_(token)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": shifted_vae(),
        "text_encoder": tiny_qwen(),
        "tokenizer": word_tokenizer(TOKENS, chat_template=CHAT_TEMPLATE),
    }


def z_from_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return with_image(from_text(pipeline, variation), variation)


def ovis() -> OvisImagePipeline:
    return OvisImagePipeline(
        transformer=OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=shifted_vae(),
        text_encoder=tiny_qwen(),
        tokenizer=word_tokenizer(chat_template=CHAT_TEMPLATE),
    )


def kandinsky_5() -> Kandinsky5T2IPipeline:
    pipeline = Kandinsky5T2IPipeline(
        transformer=without_zeros(
            Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                out_visual_dim=4,
                in_text_dim=WIDTH,
                in_text_dim2=WIDTH,
                time_dim=32,
                model_dim=32,
                ff_dim=64,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(8, 4, 4),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=tiny_qwen_vl(),
        tokenizer=word_tokenizer(64),
        text_encoder_2=tiny_clip(),
        tokenizer_2=clip_tokenizer(),
    )
    # It makes images of listed sizes only, all of about a megapixel.
    pipeline.resolutions = [(4 * SIZE, 4 * SIZE)]
    return pipeline


def kandinsky_5_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """It takes its VAE for one that divides by eight: the image is a quarter as wide."""
    return {**from_text(pipeline, variation), "height": 4 * SIZE, "width": 4 * SIZE}


FAMILIES = (
    Family(
        "Qwen-Image",
        seeded(lambda: QwenImagePipeline(**qwen_image_components())),
        qwen_from_text,
    ),
    Family(
        "Qwen-Image, image to image",
        seeded(lambda: QwenImageImg2ImgPipeline(**qwen_image_components())),
        qwen_from_image,
    ),
    Family(
        "Qwen-Image, inpainting",
        seeded(lambda: QwenImageInpaintPipeline(**qwen_image_components())),
        qwen_masked,
    ),
    Family(
        "Z-Image",
        seeded(lambda: ZImagePipeline(**z_image_components())),
        from_text,
    ),
    Family(
        "Z-Image, image to image",
        seeded(lambda: ZImageImg2ImgPipeline(**z_image_components())),
        z_from_image,
    ),
    Family("Ovis-Image", seeded(ovis), from_text),
    Family(
        "Kandinsky 5, image",
        seeded(kandinsky_5),
        kandinsky_5_from_text,
        remark="its time embedding computes in float32 only",
        float64=False,
        bfloat16=False,
    ),
)
