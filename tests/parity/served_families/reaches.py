"""Which HTTP call reaches which family, and which families none reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import adapted, controlled
from .calls import EDITS, GENERATIONS, VARIATIONS, HttpCall, Input, built

PROMPT: dict[str, Any] = {"prompt": Input.PROMPT}
IMAGE: dict[str, Any] = {"image": {"image_url": Input.IMAGE}}
STRENGTH: dict[str, Any] = {"strength": Input.STRENGTH}
MASK: dict[str, Any] = {"mask": {"image_url": Input.MASK}}

FROM_TEXT = HttpCall(GENERATIONS, PROMPT, PROMPT)
FROM_NOTHING = HttpCall(GENERATIONS, {}, {})
OF_A_CLASS = HttpCall(
    GENERATIONS, {"class_label": Input.CLASS_LABEL}, {"class_labels": [Input.CLASS_LABEL]}
)
FROM_IMAGE = HttpCall(EDITS, PROMPT | IMAGE | STRENGTH, PROMPT | {"image": Input.IMAGE} | STRENGTH)
VARIED = HttpCall(VARIATIONS, *(FROM_IMAGE.body, FROM_IMAGE.arguments))
FILLED = HttpCall(
    EDITS, PROMPT | IMAGE | MASK, PROMPT | {"image": Input.IMAGE, "mask_image": Input.MASK}
)
REPAINTED = HttpCall(EDITS, {**FILLED.body, **STRENGTH}, {**FILLED.arguments, **STRENGTH})
EDITED = HttpCall(EDITS, PROMPT | IMAGE, PROMPT | {"image": Input.IMAGE})
EDITED_WITH_SCALE = HttpCall(
    EDITS,
    {**EDITED.body} | {"image_guidance_scale": Input.IMAGE_GUIDANCE},
    {**EDITED.arguments, "image_guidance_scale": Input.IMAGE_GUIDANCE},
)
FROM_SEVERAL = HttpCall(
    EDITS,
    PROMPT | {"images": [{"image_url": Input.IMAGE}, {"image_url": Input.SECOND_IMAGE}]},
    PROMPT | {"image": [Input.IMAGE, Input.SECOND_IMAGE]},
    side_px=64,
)

# Their text encoders see the images, by way of a processor that is in no folder.
SEEN = replace(EDITED, read=built, side_px=16)
SEVERAL_SEEN = replace(FROM_SEVERAL, read=built, side_px=16)
IN_JSON = {"prompt": Input.EDIT_IN_JSON}
EDITED_IN_JSON = HttpCall(EDITS, IN_JSON | IMAGE, IN_JSON | {"image": Input.IMAGE}, side_px=64)

REACHES = (
    adapted.REACHES
    | controlled.REACHES
    | {
        "AuraFlow": FROM_TEXT,
        "Bria": FROM_TEXT,
        "Bria Fibo Edit": EDITED_IN_JSON,
        "Chroma": FROM_TEXT,
        "Chroma, image to image": FROM_IMAGE,
        "CogView 3 Plus": FROM_TEXT,
        "CogView 4": FROM_TEXT,
        "Consistency model": OF_A_CLASS,
        "DDIM": FROM_NOTHING,
        "DDPM": FROM_NOTHING,
        "DeepFloyd IF": FROM_TEXT,
        "DiT": OF_A_CLASS,
        "DreamLite, edit": replace(EDITED_WITH_SCALE, read=built, side_px=16),
        "FLUX": FROM_TEXT,
        "FLUX Fill": FILLED,
        "FLUX Kontext": EDITED,
        "FLUX Kontext, inpainting": REPAINTED,
        "FLUX, image to image": FROM_IMAGE,
        "FLUX, inpainting": REPAINTED,
        "FLUX.2": FROM_TEXT,
        "FLUX.2 Klein": FROM_TEXT,
        "FLUX.2 Klein with a key-value cache": FROM_TEXT,
        "FLUX.2 Klein with a key-value cache, edit": FROM_SEVERAL,
        "FLUX.2 Klein, inpainting": REPAINTED,
        "FLUX.2 Klein, with reference images": FROM_SEVERAL,
        "FLUX.2, with reference images": FROM_SEVERAL,
        "HiDream": FROM_TEXT,
        "Hunyuan-DiT": FROM_TEXT,
        "HunyuanImage": FROM_TEXT,
        "HunyuanImage, with a guider that skips layers": FROM_TEXT,
        "InstructPix2Pix": EDITED_WITH_SCALE,
        "InstructPix2Pix of Stable Diffusion XL": EDITED_WITH_SCALE,
        "JoyImage-Edit": SEEN,
        "JoyImage-Edit-Plus": replace(
            SEVERAL_SEEN, arguments=PROMPT | {"images": [Input.IMAGE, Input.SECOND_IMAGE]}
        ),
        "Kandinsky 3": FROM_TEXT,
        "Kandinsky 5, image": FROM_TEXT,
        "Latent consistency model": FROM_TEXT,
        "Latent diffusion, unconditional": FROM_NOTHING,
        "LongCat-Image-Edit": SEEN,
        "Lumina Image 2": FROM_TEXT,
        "Ovis-Image": FROM_TEXT,
        "PNDM": FROM_NOTHING,
        "PixArt-alpha": FROM_TEXT,
        "PixArt-sigma": FROM_TEXT,
        "PixArt-sigma with perturbed-attention guidance": FROM_TEXT,
        "Qwen-Image": FROM_TEXT,
        "Qwen-Image 2.1": replace(FROM_TEXT, read=built),
        "Qwen-Image, image to image": FROM_IMAGE,
        "Qwen-Image, inpainting": REPAINTED,
        "Qwen-Image-Edit": SEEN,
        "Qwen-Image-Edit, inpainting": replace(REPAINTED, read=built, side_px=16),
        "Qwen-Image-Edit-Plus": SEVERAL_SEEN,
        "Sana": FROM_TEXT,
        "Sana with perturbed-attention guidance": FROM_TEXT,
        "Sana Sprint": FROM_TEXT,
        "Stable Diffusion": FROM_TEXT,
        "Stable Diffusion 3": FROM_TEXT,
        "Stable Diffusion 3 with perturbed-attention guidance": FROM_TEXT,
        "Stable Diffusion 3, image to image": FROM_IMAGE,
        "Stable Diffusion 3, inpainting": REPAINTED,
        "Stable Diffusion XL": FROM_TEXT,
        "Stable Diffusion XL with perturbed-attention guidance": FROM_TEXT,
        "Stable Diffusion XL, image to image": FROM_IMAGE,
        "Stable Diffusion XL, inpainting": REPAINTED,
        "Stable Diffusion with perturbed-attention guidance": FROM_TEXT,
        "Stable Diffusion, image to image": VARIED,
        "Stable Diffusion, inpainting": REPAINTED,
        "StableUnCLIP": FROM_TEXT,
        "Z-Image": FROM_TEXT,
        "Z-Image, image to image": FROM_IMAGE,
    }
)

OF_ANOTHER = "it begins with what another pipeline computes, and no request can give: {}"
UPSCALED = HttpCall("/v1/images/upscale", PROMPT | IMAGE, PROMPT | {"image": Input.IMAGE})
WITH_NOISE_LEVEL = replace(UPSCALED, body={**UPSCALED.body, "noise_level": 20})
# Proven over HTTP as well, each by tests that know what they need.
TRIED_ELSEWHERE = {
    "DeepFloyd IF, super-resolution": WITH_NOISE_LEVEL,
    "Latent diffusion super-resolution": replace(UPSCALED, body=IMAGE),
    "Stable Diffusion latent upscaler": UPSCALED,
    "Stable Diffusion upscaler": WITH_NOISE_LEVEL,
    "Z-Image Omni": FROM_SEVERAL,
}
UNREACHED = {
    "DeepFloyd IF, super-resolution from an image": "it needs the image in two sizes",
    "Hunyuan-DiT with perturbed-attention guidance": "diffusers' call raises without guidance",
    "Kandinsky 2.2, decoder": OF_ANOTHER.format("embeddings of the image"),
    "Qwen-Image 2.1, edit": "the tiny model cannot be probed with images of the smallest size",
    "Stable Cascade, both stages": "diffusers cannot read the folder that it has saved",
    "Stable Cascade, decoder": OF_ANOTHER.format("embeddings of the image"),
}
