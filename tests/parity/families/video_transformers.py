"""Text to video with transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from .family import Family, Variation, seeded
from .tokenizers import VOCABULARY, word_tokenizer
from .video_parts import (
    clip_text,
    cogvideox_vae,
    embeddings_to_video,
    hunyuan_vae,
    image_vae,
    ltx_vae,
    second,
    t5,
    text_to_video,
    wan_vae,
)

SIXTEEN_WORDS = {"max_sequence_length": 16}
HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def wan_transformer(kind: str = "WanTransformer3DModel", **more: Any) -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return getattr(diffusers, kind)(**config | more)


def wan_parts() -> dict[str, Any]:
    return t5("UMT5") | {
        "vae": wan_vae(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def wan() -> Any:
    return diffusers.WanPipeline(transformer=wan_transformer(), **wan_parts())


def wan_two_experts() -> Any:
    return diffusers.WanPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.9,
        **wan_parts(),
    )


def skyreels() -> Any:
    transformer = wan_transformer("SkyReelsV2Transformer3DModel")
    return diffusers.SkyReelsV2Pipeline(transformer=transformer, **wan_parts())


def wan_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=5, **SIXTEEN_WORDS)


def skyreels_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return embeddings_to_video(variation, 16, num_frames=5)


def ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return t5() | {"transformer": transformer, "vae": ltx_vae(), "scheduler": scheduler}


def ltx() -> Any:
    return diffusers.LTXPipeline(**ltx_parts())


def ltx_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 32, num_frames=9, **SIXTEEN_WORDS)


def cogvideox_parts(**config: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4}
    transformer = diffusers.CogVideoXTransformer3DModel(
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
        **shape | config,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return t5() | {"transformer": transformer, "vae": cogvideox_vae(), "scheduler": scheduler}


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(**cogvideox_parts())


def cogvideox_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=5, **SIXTEEN_WORDS)


def hunyuan_transformer(**config: Any) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN | config)


def llama_config(vocab_size: int = VOCABULARY) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
    )


def hunyuan_parts() -> dict[str, Any]:
    return second(clip_text(8)) | {
        "vae": hunyuan_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "tokenizer": word_tokenizer(),
    }


def hunyuan() -> Any:
    return diffusers.HunyuanVideoPipeline(
        transformer=hunyuan_transformer(),
        text_encoder=transformers.LlamaModel(llama_config()),
        **hunyuan_parts(),
    )


def hunyuan_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    template = {"template": "{}", "crop_start": 0}
    return text_to_video(variation, 16, num_frames=5, prompt_template=template, **SIXTEEN_WORDS)


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **t5())


def mochi_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, num_frames=7, **SIXTEEN_WORDS)


def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return diffusers.LattePipeline(
        transformer=transformer, vae=image_vae(), scheduler=diffusers.DDIMScheduler(), **t5()
    )


def latte_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(variation, 16, video_length=2, clean_caption=False)


FAMILIES = (
    Family("Wan 2.1, text to video", seeded(wan), wan_arguments),
    Family(
        "Wan 2.2, text to video",
        seeded(wan_two_experts),
        wan_arguments,
        remark="two transformers, one after the other",
    ),
    Family("SkyReels V2, text to video", seeded(skyreels), skyreels_arguments),
    Family("LTX, text to video", seeded(ltx), ltx_arguments),
    Family(
        "CogVideoX, text to video",
        seeded(cogvideox),
        cogvideox_arguments,
        schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    ),
    Family("HunyuanVideo, text to video", seeded(hunyuan), hunyuan_arguments),
    Family("Mochi, text to video", seeded(mochi), mochi_arguments),
    Family(
        "Latte, text to video",
        seeded(latte),
        latte_arguments,
        schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
    ),
)
