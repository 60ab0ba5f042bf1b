"""FLUX in its seven forms, and its kin: FLUX.2, Chroma and Bria."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .family import Family, Variation, seeded
from .image_transformer_parts import (
    SIZE,
    TOKENS,
    WIDTH,
    clip_and_t5,
    decoder_arguments,
    mask,
    old_position_embedding,
    shifted_vae,
    start_image,
    text_arguments,
    tiny_t5,
    without_zeros,
)
from .tokenizers import VOCABULARY, word_tokenizer

LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS
"""Two by two latents make one token."""
IMAGE_TOKEN = VOCABULARY - 1
"""A token that no word has."""
CHAT_TEMPLATE = "user : {{ messages[0].content }}"
USER_MESSAGES = """
{%- for message in messages if message.role == 'user' -%}
  {{ message.content[0].text }}
{%- endfor -%}
"""


def attention() -> dict[str, Any]:
    return {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH}


def blocks(in_channels: int = PACKED_CHANNELS) -> dict[str, Any]:
    """Configuration that a ControlNet shares with the transformer."""
    return {
        "in_channels": in_channels,
        "num_layers": 1,
        "num_single_layers": 1,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
        **attention(),
    }


def shifting_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def components(in_channels: int = PACKED_CHANNELS) -> dict[str, Any]:
    return {
        "transformer": FluxTransformer2DModel(out_channels=PACKED_CHANNELS, **blocks(in_channels)),
        "scheduler": shifting_scheduler(),
        "vae": shifted_vae(LATENT_CHANNELS),
        **clip_and_t5(),
    }


def from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """Guidance is an input of the model: there is no second, negative prompt."""
    return text_arguments(variation, negative_prompt=None, max_sequence_length=TOKENS)


def from_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image, strength = start_image(variation), variation.strength
    return {**from_text(pipeline, variation), "image": image, "strength": strength}


def in_context(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **from_text(pipeline, variation),
        "image": start_image(variation),
        "max_area": SIZE * SIZE,
        "_auto_resize": False,
    }


def filled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image = start_image(variation)
    return {**from_text(pipeline, variation), "image": image, "mask_image": mask(variation)}


def masked(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**filled(pipeline, variation), "strength": variation.strength}


def with_control_latents(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**from_text(pipeline, variation), "control_image": start_image(variation)}


def controlled(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {
        **from_text(pipeline, variation),
        "control_image": start_image(variation),
        "controlnet_conditioning_scale": 0.5 + 0.1 * variation.index,
    }


@old_position_embedding()
def controlnet() -> FluxControlNetModel:
    return without_zeros(FluxControlNetModel(**blocks()))


def flux_2_text_encoder() -> Mistral3ForConditionalGeneration:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"model_type": "mistral", **decoder_arguments()}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    )


def flux_2_components(guidance_embeds: bool) -> dict[str, Any]:
    return {
        "transformer": Flux2Transformer2DModel(
            in_channels=PACKED_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
            **attention(),
        ),
        "scheduler": shifting_scheduler(),
        "vae": AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=LATENT_CHANNELS,
        ),
    }


def flux_2() -> Flux2Pipeline:
    return Flux2Pipeline(
        **flux_2_components(guidance_embeds=True),
        text_encoder=flux_2_text_encoder(),
        tokenizer=word_tokenizer(chat_template=USER_MESSAGES),
    )


def flux_2_klein() -> Flux2KleinPipeline:
    """It has guidance of the usual kind, with a second, empty prompt."""
    return Flux2KleinPipeline(
        **flux_2_components(guidance_embeds=False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**decoder_arguments())),
        tokenizer=word_tokenizer(chat_template=CHAT_TEMPLATE),
    )


def flux_2_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return {**from_text(pipeline, variation), "text_encoder_out_layers": (1,)}


@old_position_embedding()
def chroma_transformer() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=PACKED_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **attention(),
    )


def t5_components() -> dict[str, Any]:
    return {
        "scheduler": shifting_scheduler(),
        "vae": shifted_vae(LATENT_CHANNELS),
        "text_encoder": tiny_t5(),
        "tokenizer": word_tokenizer(TOKENS),
    }


def chroma() -> ChromaPipeline:
    return ChromaPipeline(transformer=chroma_transformer(), **t5_components())


def chroma_from_image() -> ChromaImg2ImgPipeline:
    return ChromaImg2ImgPipeline(transformer=chroma_transformer(), **t5_components())


def bria() -> BriaPipeline:
    transformer = BriaTransformer2DModel(
        in_channels=PACKED_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        axes_dims_rope=[4, 4, 8],
        **attention(),
    )
    return BriaPipeline(transformer=transformer, **t5_components())


def guided(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """With a second, negative prompt."""
    return text_arguments(variation, max_sequence_length=TOKENS)


def guided_from_image(pipeline: Any, variation: Variation) -> dict[str, Any]:
    image, strength = start_image(variation), variation.strength
    return {**guided(pipeline, variation), "image": image, "strength": strength}


def bria_from_text(pipeline: Any, variation: Variation) -> dict[str, Any]:
    """It counts the halving of the patches as the VAE's."""
    return {**guided(pipeline, variation), "height": 2 * SIZE, "width": 2 * SIZE}


FAMILIES = (
    Family("FLUX", seeded(lambda: FluxPipeline(**components())), from_text),
    Family(
        "FLUX, image to image",
        seeded(lambda: FluxImg2ImgPipeline(**components())),
        from_image,
    ),
    Family(
        "FLUX Kontext",
        seeded(lambda: FluxKontextPipeline(**components())),
        in_context,
    ),
    Family(
        "FLUX Fill",
        # Latents, the masked image's latents, and the mask folded into as many channels.
        seeded(lambda: FluxFillPipeline(**components(3 * PACKED_CHANNELS))),
        filled,
    ),
    Family(
        "FLUX, inpainting",
        seeded(lambda: FluxInpaintPipeline(**components())),
        masked,
    ),
    Family(
        "FLUX Control",
        # Latents and those of the control image, side by side.
        seeded(lambda: FluxControlPipeline(**components(2 * PACKED_CHANNELS))),
        with_control_latents,
    ),
    Family(
        "FLUX with a ControlNet",
        seeded(lambda: FluxControlNetPipeline(controlnet=controlnet(), **components())),
        controlled,
    ),
    Family("FLUX.2", seeded(flux_2), flux_2_from_text),
    Family("FLUX.2 Klein", seeded(flux_2_klein), flux_2_from_text),
    Family("Chroma", seeded(chroma), guided),
    Family("Chroma, image to image", seeded(chroma_from_image), guided_from_image),
    Family("Bria", seeded(bria), bria_from_text),
)
