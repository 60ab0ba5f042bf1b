"""StableUnCLIP: a prior makes an image embedding of the prompt, which the UNet is told too."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from families.family import Family, Variation, seeded
from families.kandinsky import tiny_prior
from families.tokenizers import clip_tokenizer
from families.unet_parts import WIDTH, text_to_image, tiny_clip_text, tiny_unet, tiny_vae


def build() -> StableUnCLIPPipeline:
    # The embedding, to which noise was added, stands beside one of how much.
    unet = tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    return StableUnCLIPPipeline(
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=tiny_clip_text(projection=True),
        prior=tiny_prior(),
        prior_scheduler=DDPMScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=clip_tokenizer(),
        text_encoder=tiny_clip_text(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=tiny_vae(),
    )


def arguments(pipeline: Any, variation: Variation) -> dict[str, Any]:
    return text_to_image(pipeline, variation) | {
        "prior_num_inference_steps": variation.num_inference_steps
    }


FAMILIES = (
    Family(
        "StableUnCLIP",
        seeded(build),
        arguments,
        denoiser="unet",
        schedulers=("DDIMScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"),
        remark="has a second denoiser, the prior, with a scheduler of its own",
    ),
)
