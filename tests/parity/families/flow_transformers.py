"""Flow-matching image transformers that read prompts with a language model or a T5."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    decoder_arguments,
    shifted_vae,
    t5_arguments,
    text_arguments,
    tiny_vae,
    with_stronger_blocks,
    without_zeros,
)
from .tokenizers import word_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }}{% endfor %}"
)


def tiny_gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**decoder_arguments(), attn_implementation="eager"))


def from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_arguments(variation, max_sequence_length=TOKENS)


def tiny_deep_compression_vae() -> AutoencoderDC:
    coder = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8)}
    coder |= {"qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1)}
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        **{f"encoder_{name}": value for name, value in coder.items()},
        **{f"decoder_{name}": value for name, value in coder.items()},
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def sana() -> SanaPipeline:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=SIZE,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_deep_compression_vae(),
        text_encoder=tiny_gemma(),
        tokenizer=word_tokenizer(TOKENS),
    )


def sana_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **from_text(pipeline, variation),
        "height": 2 * SIZE,
        "width": 2 * SIZE,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }


def lumina_2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=SIZE // 2,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=tiny_gemma(),
        tokenizer=word_tokenizer(TOKENS),
    )


def lumina_2_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """It takes its VAE for one that divides by eight: the picture is a quarter as wide."""
    arguments = from_text(pipeline, variation)
    return {**arguments, "height": 4 * SIZE, "width": 4 * SIZE, "system_prompt": "describe"}


def aura_flow() -> AuraFlowPipeline:
    return AuraFlowPipeline(
        transformer=with_stronger_blocks(
            AuraFlowTransformer2DModel(
                sample_size=SIZE // 2,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=WIDTH,
                pos_embed_max_size=SIZE * SIZE // 16,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=tiny_vae(),
        text_encoder=UMT5EncoderModel(UMT5Config(**t5_arguments())),
        tokenizer=word_tokenizer(TOKENS),
    )


def cogview_4() -> CogView4Pipeline:
    return CogView4Pipeline(
        transformer=CogView4Transformer2DModel(
            sample_size=SIZE // 2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(SIZE // 4, SIZE // 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        vae=tiny_vae(),
        text_encoder=GlmModel(GlmConfig(**decoder_arguments())),
        tokenizer=word_tokenizer(TOKENS),
    )


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


QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


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


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_qwen_vae(),
        text_encoder=tiny_qwen_vl(),
        tokenizer=word_tokenizer(),
    )


def qwen_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = text_arguments(variation, guidance_scale=None, max_sequence_length=TOKENS)
    return {**arguments, "true_cfg_scale": variation.guidance_scale}


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        transformer=without_zeros(
            ZImageTransformer2DModel(
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
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**decoder_arguments())),
        tokenizer=word_tokenizer(TOKENS, chat_template=CHAT_TEMPLATE),
    )


FAMILIES = (
    Family("Sana", seeded(sana), sana_from_text),
    Family("Lumina Image 2", seeded(lumina_2), lumina_2_from_text),
    Family("AuraFlow", seeded(aura_flow), from_text),
    Family("CogView 4", seeded(cogview_4), from_text),
    Family("Qwen-Image", seeded(qwen_image), qwen_from_text),
    Family("Z-Image", seeded(z_image), from_text),
)
