"""Requests that begin with a picture: their bodies, and the pictures they bring along."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace

from service.api.body_reading import JSON
from service.api.dependencies import FORM, Incoming, declared_type
from service.api.errors import MalformedJsonError
from service.api.fetch import fetch_picture
from service.api.forms import parse_body, parse_fields, read_form
from service.api.keys import Caller
from service.api.schemas import EditRequest, PictureReference, VariationRequest
from service.api.uploads import Upload, prepare_image, prepare_mask
from service.domain.errors import InvalidRequestError
from service.domain.models import ModelCapabilities, SizeRange
from service.domain.requests import GenerationRequest, Task

InputBody = EditRequest | VariationRequest


@dataclass(frozen=True)
class Inputs:
    """The body of a request, the picture it begins with, and where to repaint that, or None."""

    body: InputBody
    image: Upload
    mask: Upload | None = None

    def to_generation(
        self, request_id: str, caller: Caller, model: ModelCapabilities
    ) -> GenerationRequest:
        """Return the request with everything left out filled in from `model`; draws a seed.

        Where no size is asked for, it is the picture's own, or the nearest one of the model.
        """
        filled = self.body.fill_in(request_id, caller, model)
        prompt = self.body.prompt or ""
        if self.body.size in (None, "auto"):
            width, height = nearest_size(self.image.width, self.image.height, model.sizes)
            filled = replace(filled, width=width, height=height)
        if not prompt and self.body.guidance_scale is None:
            # Guidance leads towards the prompt: without one it would only cost.
            filled = replace(filled, guidance_scale=1.0)
        return replace(
            filled,
            prompt=prompt,
            task=Task.IMAGE_TO_IMAGE if self.mask is None else Task.INPAINTING,
            image=self.image.file,
            mask_image=None if self.mask is None else self.mask.file,
            strength=filled.strength if self.body.strength is None else self.body.strength,
        )


def nearest_size(width: int, height: int, sizes: SizeRange) -> tuple[int, int]:
    """Return the size that a picture of `width` x `height` is best served in.

    Its own if the model has it; else about as many pixels as the native size has, in the shape that
    is nearest to the picture's.
    """
    if sizes.accepts(width) and sizes.accepts(height):
        return width, height
    scale = sizes.native / (width * height) ** 0.5
    return _nearest_side(width * scale, sizes), _nearest_side(height * scale, sizes)


def _nearest_side(side_px: float, sizes: SizeRange) -> int:
    steps = round((side_px - sizes.minimum) / sizes.step)
    most = (sizes.maximum - sizes.minimum) // sizes.step
    return sizes.minimum + min(max(steps, 0), most) * sizes.step


async def read_inputs(incoming: Incoming, body_class: type[InputBody]) -> Inputs:
    """Read a form with files, or JSON with addresses, and make the pictures safe.

    Raises:
        UnsupportedMediaTypeError: it is neither.
        InvalidRequestError: names the field that is wrong or missing.
    """
    if declared_type(incoming.http, FORM, JSON) == FORM:
        form = await read_form(incoming.http)
        body = parse_fields(form.fields, body_class)
        files = form.files
    else:
        body = parse_body(await _json(incoming), body_class)
        files = {}
    images = [*files.pop("image", []), *files.pop("images", [])]
    masks = files.pop("mask", [])
    if files:
        raise InvalidRequestError(f"unknown file {min(files)!r} (known: image, mask)", min(files))
    images += [await _fetch(incoming, "image", address) for address in _image_addresses(body)]
    masks += [await _fetch(incoming, "mask", address) for address in _mask_addresses(body)]
    image, mask = _only("image", images), _only("mask", masks)
    if image is None:
        raise InvalidRequestError("image is required", "image")
    return await _prepared(incoming, body, image, mask)


async def _prepared(
    incoming: Incoming, body: InputBody, image: bytes, mask: bytes | None
) -> Inputs:
    limits = incoming.settings.uploads
    picture = await asyncio.to_thread(prepare_image, image, "image", limits)
    if mask is None:
        return Inputs(body, picture)
    repainted = await asyncio.to_thread(prepare_mask, mask, "mask", limits)
    if (repainted.width, repainted.height) != (picture.width, picture.height):
        raise InvalidRequestError(
            f"mask is {repainted.width}x{repainted.height} pixels and image "
            f"{picture.width}x{picture.height}: they must be equal",
            "mask",
        )
    return Inputs(body, picture, repainted)


async def _json(incoming: Incoming) -> object:
    try:
        return json.loads(await incoming.http.body())
    except (ValueError, RecursionError) as error:
        raise MalformedJsonError("the body is not valid JSON in UTF-8") from error


async def _fetch(incoming: Incoming, field: str, address: str) -> bytes:
    return await fetch_picture(address, field, incoming.settings.uploads)


def _image_addresses(body: InputBody) -> list[str]:
    single = [] if body.image is None else [body.image]
    return [*single, *(reference.image_url for reference in body.images or ())]


def _mask_addresses(body: InputBody) -> list[str]:
    mask = body.mask if isinstance(body, EditRequest) else None
    if mask is None:
        return []
    return [mask.image_url if isinstance(mask, PictureReference) else mask]


def _only(field: str, files: list[bytes]) -> bytes | None:
    if len(files) > 1:
        raise InvalidRequestError(f"{field} must be one picture, got {len(files)}", field)
    return files[0] if files else None
