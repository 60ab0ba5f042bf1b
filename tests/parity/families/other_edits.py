"""Models of several makers that edit by instruction."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    AutoencoderTiny,
    BriaFiboEditPipeline,
    BriaFiboTransformer2DModel,
    DreamLitePipeline,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.joyimage import image_processor as joy_sizes
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from transformers import (
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    decoder_arguments,
    shifted_vae,
    text_arguments,
    with_stronger_blocks,
)
from .qwen_edits import seeing_text_encoder
from .reference_images import LEAST_SHARING, REQUESTS, first_image, reference_images
from .tokenizers import word_tokenizer
from .vision_processors import PATCH, VisionProcessor, marked_tokenizer, vision_tokens

LARGER = 64
"""Of images, in pixels, where a pipeline takes no smaller ones."""

# Sizes of about a million pixels, which are no arguments of a call.
pipeline_longcat_image_edit.calculate_dimensions = lambda area, ratio: (SIZE, SIZE)
joy_sizes.BUCKETS = {1024: [(SIZE, SIZE)]}


class SharpWanVAE(AutoencoderKLWan):
    """Of a posterior without width: JoyImage samples it without the request's generator."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        (posterior,) = super().encode(x, return_dict=False)
        sharp = DiagonalGaussianDistribution(posterior.parameters, deterministic=True)
        return AutoencoderKLOutput(latent_dist=sharp) if return_dict else (sharp,)


def wan_vae(levels: int, cls: type[AutoencoderKLWan] = AutoencoderKLWan) -> AutoencoderKLWan:
    """Halves width and height at every level but the last."""
    return cls(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 0.5, 1.0],
        scale_factor_temporal=1,
        scale_factor_spatial=2 ** (levels - 1),
    )


def qwen_3_vl() -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {**decoder_arguments(), "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **vision_tokens())
    return Qwen3VLForConditionalGeneration(config)


def reads_images() -> dict[str, Any]:
    return {
        "text_encoder": qwen_3_vl(),
        "tokenizer": marked_tokenizer(),
        "processor": VisionProcessor(),
    }


def long_cat() -> LongCatImageEditPipeline:
    processor = VisionProcessor()
    return LongCatImageEditPipeline(
        transformer=LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 4, 8],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        # Its pipeline knows no other number of channels.
        vae=shifted_vae(16),
        text_encoder=seeing_text_encoder(),
        tokenizer=processor.tokenizer,
        text_processor=processor,
    )


def joy() -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": WIDTH,
        "num_layers": 1,
        "rope_dim_list": [4, 4, 8],
    }


def joy_image() -> JoyImageEditPipeline:
    return JoyImageEditPipeline(
        transformer=with_stronger_blocks(JoyImageEditTransformer3DModel(**joy())),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(2, SharpWanVAE),
        **reads_images(),
    )


def joy_image_plus() -> JoyImageEditPlusPipeline:
    return JoyImageEditPlusPipeline(
        transformer=with_stronger_blocks(JoyImageEditPlusTransformer3DModel(**joy())),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(2),
        **reads_images(),
    )


def fibo() -> BriaFiboEditPipeline:
    # The empty prompt is a token of its own.
    text = SmolLM3Config(**{**decoder_arguments(), "vocab_size": 128_001})
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    return BriaFiboEditPipeline(
        transformer=with_stronger_blocks(transformer, 3.0),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=wan_vae(5),
        text_encoder=SmolLM3ForCausalLM(text),
        tokenizer=word_tokenizer(64),
    )


def dream_lite() -> DreamLitePipeline:
    return DreamLitePipeline(
        unet=DreamLiteUNetModel(
            sample_size=SIZE // 2,
            block_out_channels=(16, 32),
            down_block_types=(
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
            attention_head_dim=(1, 2),
            addition_embed_type=None,
            ff_mult=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        **reads_images(),
    )


def z_image_omni() -> ZImageOmniPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        siglip_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token, transformer.siglip_pad_token):
        torch.nn.init.normal_(token)
    vision = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=PATCH,
    )
    return ZImageOmniPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        # Its pipeline hands it images in this precision, whatever its own.
        vae=shifted_vae().to(torch.bfloat16),
        text_encoder=Qwen3Model(Qwen3Config(**decoder_arguments())),
        tokenizer=marked_tokenizer(),
        siglip=Siglip2VisionModel(vision),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16),
    )


def edited(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**text_arguments(variation), "image": first_image(variation)}


def edited_at_own_size(pipeline: Any, variation: Variation) -> dict[str, Any]:
    arguments = edited(pipeline, variation)
    return {name: arguments[name] for name in arguments if name not in ("height", "width")}


def edited_from_many(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**text_arguments(variation), "images": reference_images(variation)}


def instructed_in_json(pipeline: Any, variation: Variation) -> dict[str, Any]:
    prompt = json.dumps({"edit_instruction": variation.prompt})
    images = reference_images(variation, LARGER)
    size = {"height": LARGER, "width": LARGER}
    return {**text_arguments(variation), **size, "prompt": prompt, "image": images}


def twice_guided(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**edited(pipeline, variation), "image_guidance_scale": 1.5}


def seen_by_siglip(pipeline: Any, variation: Variation) -> dict[str, Any]:
    images = reference_images(variation, LARGER)
    size = {"height": SIZE, "width": SIZE, "max_sequence_length": TOKENS}
    return {**text_arguments(variation, output_type="latent"), **size, "image": images}


FAMILIES = (
    Family(
        "LongCat-Image-Edit",
        seeded(long_cat),
        edited_at_own_size,
    ),
    Family(
        "JoyImage-Edit",
        seeded(joy_image),
        edited,
    ),
    Family(
        "JoyImage-Edit-Plus",
        seeded(joy_image_plus),
        edited_from_many,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each",
    ),
    Family(
        "Bria Fibo Edit",
        seeded(fibo),
        instructed_in_json,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each; the prompt is JSON",
    ),
    Family(
        "DreamLite, edit",
        seeded(dream_lite),
        twice_guided,
        denoiser="unet",
        remark="three rows a request: with neither, with the image only, with all",
    ),
    Family(
        "Z-Image Omni",
        seeded(z_image_omni),
        seen_by_siglip,
        requests=REQUESTS,
        least_sharing=LEAST_SHARING,
        remark="one to three images each; latents: its VAE runs in bfloat16 only",
        float64=False,
    ),
)
