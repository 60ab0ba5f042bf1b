"""Flow-matching image transformers that read prompts with a language model or a T5."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
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
    tiny_clip_with_projection,
    tiny_t5,
    tiny_vae,
    with_stronger_blocks,
)
from .tokenizers import clip_tokenizer, word_tokenizer

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


def sana_transformer(**more: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
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
        **more,
    )


def sana() -> SanaPipeline:
    return SanaPipeline(
        transformer=sana_transformer(),
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
    """It takes its VAE for one that divides by eight: the image is a quarter as wide."""
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


def hidream() -> HiDreamImagePipeline:
    language_model = LlamaConfig(**decoder_arguments(), attn_implementation="eager")
    pipeline = HiDreamImagePipeline(
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(SIZE // 2, SIZE // 2),
            llama_layers=[0, 1],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=tiny_clip_with_projection(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=tiny_clip_with_projection(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=tiny_t5(),
        tokenizer_3=word_tokenizer(TOKENS),
        text_encoder_4=LlamaForCausalLM(language_model),
        tokenizer_4=word_tokenizer(TOKENS),
    )
    # In latents: whatever size is asked for, it makes images of that many pixels.
    pipeline.default_sample_size = SIZE // 2
    return pipeline


def sana_sprint() -> SanaSprintPipeline:
    return SanaSprintPipeline(
        transformer=sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        scheduler=SCMScheduler(),
        vae=tiny_deep_compression_vae(),
        text_encoder=tiny_gemma(),
        tokenizer=word_tokenizer(TOKENS),
    )


def sana_sprint_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = sana_from_text(pipeline, variation)
    del arguments["negative_prompt"]
    return {**arguments, "intermediate_timesteps": None}


FAMILIES = (
    Family("Sana", seeded(sana), sana_from_text),
    Family("Sana Sprint", seeded(sana_sprint), sana_sprint_from_text),
    Family("Lumina Image 2", seeded(lumina_2), lumina_2_from_text),
    Family("AuraFlow", seeded(aura_flow), from_text),
    Family("CogView 4", seeded(cogview_4), from_text),
    Family("HiDream", seeded(hidream), from_text),
)
