"""Images and videos to video, with transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from .family import Family, Variation, seeded
from .video_parts import clip_vision, embeddings_to_video, pil_images, start_image, text_to_video
from .video_transformers import (
    HUNYUAN,
    SIXTEEN_WORDS,
    cogvideox_parts,
    hunyuan_parts,
    hunyuan_transformer,
    llama_config,
    ltx_parts,
    wan_parts,
    wan_transformer,
)

IMAGE_TOKEN = 101
PATCHES = 16  # of the image that Llava is shown


def clip_parts() -> dict[str, Any]:
    return {
        "image_encoder": clip_vision(4, 16, 4),
        "image_processor": transformers.CLIPImageProcessorPil(crop_size=16, size=16),
    }


def wan_from_image() -> Any:
    return diffusers.WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=24),
        **clip_parts(),
        **wan_parts(),
    )


def wan_from_image_two_experts() -> Any:
    return diffusers.WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36),
        transformer_2=wan_transformer(in_channels=36),
        boundary_ratio=0.9,
        **wan_parts(),
    )


def wan_from_image_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    image = pil_images(variation, 16)[0]
    return embeddings_to_video(variation, 16, image=image, num_frames=5)


def wan_from_video() -> Any:
    return diffusers.WanVideoToVideoPipeline(transformer=wan_transformer(), **wan_parts())


def wan_from_video_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    video = pil_images(variation, 16, 5)
    return embeddings_to_video(variation, 16, video=video, strength=variation.strength)


def wan_vace() -> Any:
    transformer = wan_transformer("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)
    return diffusers.WanVACEPipeline(transformer=transformer, **wan_parts())


def wan_vace_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return embeddings_to_video(
        variation,
        16,
        video=pil_images(variation, 16, 5),
        mask=[image.convert("L") for image in pil_images(variation, 16, 5)],
        num_frames=5,
    )


def skyreels_from_image() -> Any:
    transformer = wan_transformer(
        "SkyReelsV2Transformer3DModel", in_channels=36, image_dim=4, added_kv_proj_dim=24
    )
    return diffusers.SkyReelsV2ImageToVideoPipeline(
        transformer=transformer, **clip_parts(), **wan_parts()
    )


def ltx_from_image() -> Any:
    return diffusers.LTXImageToVideoPipeline(**ltx_parts())


def ltx_from_image_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    image = start_image(variation, 32)
    return text_to_video(variation, 32, image=image, num_frames=9, **SIXTEEN_WORDS)


def ltx_conditioned() -> Any:
    return diffusers.LTXConditionPipeline(**ltx_parts())


def cogvideox_from_image() -> Any:
    parts = cogvideox_parts(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    return diffusers.CogVideoXImageToVideoPipeline(**parts)


def cogvideox_from_image_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    image = start_image(variation, 16)
    return text_to_video(variation, 16, image=image, num_frames=8, **SIXTEEN_WORDS)


def cogvideox_from_video() -> Any:
    return diffusers.CogVideoXVideoToVideoPipeline(**cogvideox_parts())


def cogvideox_from_video_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    video = pil_images(variation, 16, 8)
    return text_to_video(variation, 16, video=video, strength=variation.strength, **SIXTEEN_WORDS)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=16,
        patch_size=4,
    )
    text = llama_config(vocab_size=IMAGE_TOKEN + 1)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        pad_token_id=0,
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config)


def hunyuan_from_image() -> Any:
    transformer = hunyuan_transformer(in_channels=9, image_condition_type="latent_concat")
    return diffusers.HunyuanVideoImageToVideoPipeline(
        transformer=transformer,
        text_encoder=llava(),
        image_processor=transformers.CLIPImageProcessorPil(crop_size=16, size=16),
        **hunyuan_parts(),
    )


def hunyuan_from_image_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    template = {
        "template": "{}",
        "crop_start": 0,
        "image_emb_len": PATCHES,
        "image_emb_start": 5,
        "image_emb_end": 5 + PATCHES,
    }
    return text_to_video(
        variation,
        16,
        image=pil_images(variation, 16)[0],
        num_frames=9,
        prompt_template=template,
        max_sequence_length=32,
    )


def framepack() -> Any:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN | {"patch_size": 2},
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=16,
        patch_size=4,
    )
    size = {"height": 16, "width": 16}
    return diffusers.HunyuanVideoFramepackPipeline(
        transformer=transformer,
        text_encoder=transformers.LlamaModel(llama_config()),
        image_encoder=transformers.SiglipVisionModel(vision),
        feature_extractor=transformers.SiglipImageProcessorPil(size=size),
        **hunyuan_parts(),
    )


def framepack_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    return text_to_video(
        variation,
        32,
        image=pil_images(variation, 32)[0],
        num_frames=9,
        latent_window_size=3,
        prompt_template={"template": "{}", "crop_start": 0},
        **SIXTEEN_WORDS,
    )


def cogvideox_controlled() -> Any:
    return diffusers.CogVideoXFunControlPipeline(**cogvideox_parts(in_channels=8))


def cogvideox_controlled_arguments(_: Any, variation: Variation) -> dict[str, Any]:
    video = pil_images(variation, 16, 8)
    return text_to_video(variation, 16, control_video=video, **SIXTEEN_WORDS)


FAMILIES = (
    Family("Wan 2.1, image to video", seeded(wan_from_image), wan_from_image_arguments),
    Family(
        "Wan 2.2, image to video",
        seeded(wan_from_image_two_experts),
        wan_from_image_arguments,
        remark="two transformers, one after the other",
    ),
    Family("Wan, video to video", seeded(wan_from_video), wan_from_video_arguments),
    Family("Wan VACE", seeded(wan_vace), wan_vace_arguments),
    Family(
        "SkyReels V2, image to video",
        seeded(skyreels_from_image),
        wan_from_image_arguments,
    ),
    Family("LTX, image to video", seeded(ltx_from_image), ltx_from_image_arguments),
    Family("LTX, conditioned", seeded(ltx_conditioned), ltx_from_image_arguments),
    Family(
        "CogVideoX, image to video",
        seeded(cogvideox_from_image),
        cogvideox_from_image_arguments,
        schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    ),
    Family(
        "CogVideoX, video to video",
        seeded(cogvideox_from_video),
        cogvideox_from_video_arguments,
        schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    ),
    Family(
        "HunyuanVideo, image to video",
        seeded(hunyuan_from_image),
        hunyuan_from_image_arguments,
    ),
    Family(
        "CogVideoX, with a control video",
        seeded(cogvideox_controlled),
        cogvideox_controlled_arguments,
        schedulers=("CogVideoXDDIMScheduler", "DDIMScheduler"),
    ),
    Family("HunyuanVideo FramePack", seeded(framepack), framepack_arguments),
)
