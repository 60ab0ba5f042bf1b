"""Finished images as files, with everything needed to make them again inside."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, replace
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stepserve import __version__
from stepserve.domain.events import EncodedImage
from stepserve.domain.requests import GenerationRequest, OutputFormat
from stepserve.domain.step_cache import OFF

EXIF_SECTION = 0x8769
EXIF_USER_COMMENT = 0x9286
# A user comment begins with its character set. JSON escapes whatever is not ASCII.
EXIF_ASCII = b"ASCII\0\0\0"
MEDIA_TYPES = {
    OutputFormat.PNG: "image/png",
    OutputFormat.JPEG: "image/jpeg",
    OutputFormat.WEBP: "image/webp",
}
PARAMETERS_KEY = "parameters"
# They decide no pixel, and the same image should be the same bytes.
WITHOUT_EFFECT = (
    "id",
    "output_format",
    "output_compression",
    "priority",
    "deadline_s",
    "reproducible",
    "previews",
    "trajectory",
    "owner",
    "trace_context",
)
# Left out where the request has none: most tasks take few of them.
NOT_ALWAYS_THERE = (
    "images",
    "mask",
    "strength",
    "class_label",
    "image_guidance_scale",
    "noise_level",
    "controls",
    "references",
    "hires",
)
USUAL_QUALITY = 95


def parameters_of(request: GenerationRequest, index: int) -> dict[str, object]:
    """What image `index` of a request can be made again from, alone."""
    fields = asdict(replace(request, seed=request.seed + index, n=1))
    for field in WITHOUT_EFFECT:
        del fields[field]
    for field in NOT_ALWAYS_THERE:
        if fields[field] in (None, ()):
            del fields[field]
    fields["step_cache"] = fields["step_cache"] or OFF
    return {"software": f"stepserve {__version__}", **_with_hashes(fields)}


def _with_hashes(fields: dict[str, Any]) -> dict[str, object]:
    """Files as SHA-256: `image` becomes `image_sha256`, and `images` `images_sha256`."""
    told: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, bytes):
            told[f"{name}_sha256"] = hashlib.sha256(value).hexdigest()
        elif isinstance(value, tuple) and value and isinstance(value[0], bytes):
            told[f"{name}_sha256"] = [hashlib.sha256(file).hexdigest() for file in value]
        elif isinstance(value, tuple) and value and isinstance(value[0], dict):
            told[name] = [_with_hashes(entry) for entry in value]
        else:
            told[name] = value
    return told


def encode_image(image: Image.Image | None, request: GenerationRequest, index: int) -> EncodedImage:
    """Write one image in the wanted format. Same image and parameters: same bytes.

    None stands for one that the model's own safety checker withheld.
    """
    if image is None:
        return _withheld(request, index)
    parameters = json.dumps(parameters_of(request, index))
    if request.output_format is OutputFormat.PNG:
        info = PngInfo()
        info.add_itxt(PARAMETERS_KEY, parameters)
        return _encode(image, request, index, pnginfo=info)
    exif = Image.Exif()
    exif.get_ifd(EXIF_SECTION)[EXIF_USER_COMMENT] = EXIF_ASCII + parameters.encode()
    return _encode(image, request, index, exif=exif)


def encode_preview(
    image: Image.Image | None, request: GenerationRequest, index: int
) -> EncodedImage:
    """Write what an image will roughly be in the wanted format."""
    if image is None:
        return _withheld(request, index)
    return _encode(image, request, index)


def _withheld(request: GenerationRequest, index: int) -> EncodedImage:
    media_type = MEDIA_TYPES[request.output_format]
    return EncodedImage(b"", media_type, request.seed + index, content_filtered=True)


def _encode(
    image: Image.Image, request: GenerationRequest, index: int, **options: Any
) -> EncodedImage:
    if request.output_format is not OutputFormat.PNG:
        quality = request.output_compression
        options["quality"] = USUAL_QUALITY if quality is None else quality
    buffer = io.BytesIO()
    image.save(buffer, request.output_format.value.upper(), **options)
    return EncodedImage(
        buffer.getvalue(),
        MEDIA_TYPES[request.output_format],
        request.seed + index,
        size=f"{image.width}x{image.height}",
    )
