"""Text to video of families whose text encoders or schedules are of another kind."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from stepserve.pipelines.facts.guiders import set_guidance_scale

from .family import Family, Variation, seeded
from .tokenizers import VOCABULARY, word_tokenizer
from .video_parts import (
    clip_text,
    embeddings_to_video,
    hunyuan_vae,
    randomize_zeros,
    second,
    start_image,
    t5,
    text_to_video,
    wan_vae,
)
from .video_transformers import SIXTEEN_WORDS, wan_parts, wan_transformer

CHAT = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %} {% endfor %}assistant"
)
ROTARY = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]}
QWEN_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": ROTARY,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def allegro() -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae.enable_tiling()  # It decodes no other way, and only what fills a tile.
    vae.kernel, vae.stride = (8, 16, 16), (4, 8, 8)
    return diffusers.AllegroPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler(), **t5()
    )


def allegro_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=8, clean_caption=False, **SIXTEEN_WORDS)


def gemma() -> dict[str, Any]:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        head_dim=16,
        hidden_size=8,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
    )
    return {"text_encoder": transformers.Gemma2Model(config), "tokenizer": word_tokenizer()}


def sana_video_parts() -> dict[str, Any]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return gemma() | {"transformer": transformer, "vae": wan_vae()}


def sana_video() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SanaVideoPipeline(scheduler=scheduler, **sana_video_parts())


def sana_video_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(
        variation,
        32,
        frames=5,
        complex_human_instruction=[],
        use_resolution_binning=False,
        **SIXTEEN_WORDS,
    )


def sana_video_from_image() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.SanaImageToVideoPipeline(scheduler=scheduler, **sana_video_parts())


def sana_video_from_image_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return sana_video_arguments(_, variation) | {"image": start_image(variation, 32)}


def easyanimate() -> Any:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision)
    return diffusers.EasyAnimatePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=transformers.Qwen2VLForConditionalGeneration(config),
        tokenizer=word_tokenizer(chat_template=CHAT),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def easyanimate_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=5)


def kandinsky5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=128,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(8, 8, 8),
    )
    randomize_zeros(transformer)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT, vision_config=vision | {"out_hidden_size": 16}
    )
    pipeline = diffusers.Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=hunyuan_vae(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=word_tokenizer(max_tokens=512),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **second(clip_text()),
    )
    # Its template has that many words.
    pipeline.prompt_template_encode_start_idx = 122
    return pipeline


def kandinsky5_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=5, **SIXTEEN_WORDS)


def hunyuan_1_5() -> Any:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    config = transformers.Qwen2_5_VLTextConfig(**QWEN_TEXT)
    pipeline = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLTextModel(config),
        tokenizer=word_tokenizer(max_tokens=2000, chat_template=CHAT),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
        **second(t5()),
    )
    # Its template has that many words.
    pipeline.prompt_template_encode_start_idx = 90
    pipeline.tokenizer_max_length = pipeline.vision_num_semantic_tokens = 16
    return pipeline


def hunyuan_1_5_arguments(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = text_to_video(variation, 16, num_frames=5)
    # The guider takes it; each request has one of its own.
    set_guidance_scale(pipeline, arguments.pop("guidance_scale"))
    return arguments


def diffusion_forcing() -> Any:
    transformer = wan_transformer("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    return diffusers.SkyReelsV2DiffusionForcingPipeline(transformer=transformer, **wan_parts())


def diffusion_forcing_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return embeddings_to_video(variation, 16, num_frames=5, base_num_frames=5)


FAMILIES = (
    Family("Allegro", seeded(allegro), allegro_arguments),
    Family("Sana Video, text to video", seeded(sana_video), sana_video_arguments),
    Family(
        "Sana Video, image to video",
        seeded(sana_video_from_image),
        sana_video_from_image_arguments,
    ),
    Family("EasyAnimate", seeded(easyanimate), easyanimate_arguments),
    Family(
        "Kandinsky 5, text to video",
        seeded(kandinsky5),
        kandinsky5_arguments,
        float64=False,
        bfloat16=False,
        remark="its time embedding computes in float32 only",
    ),
    Family(
        "HunyuanVideo 1.5, text to video",
        seeded(hunyuan_1_5),
        hunyuan_1_5_arguments,
        remark="its guider holds the guidance scale: each request has one of its own",
    ),
    Family(
        "SkyReels V2, diffusion forcing",
        seeded(diffusion_forcing),
        diffusion_forcing_arguments,
    ),
)
