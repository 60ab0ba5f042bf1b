"""Requests that begin with an image: their bodies, and the images they bring along."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepserve.api.auth.keys import Caller
from stepserve.api.bodies.forms import parse_body, parse_fields, read_form
from stepserve.api.bodies.reading import JSON
from stepserve.api.bodies.schemas import EditRequest, ImageReference, VariationRequest
from stepserve.api.dependencies import FORM, Incoming, declared_type
from stepserve.api.errors import MalformedJsonError
from stepserve.api.inputs.fetch import fetch_image, is_elsewhere
from stepserve.api.inputs.uploads import read_upload
from stepserve.config import UploadSettings
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.requests import GenerationRequest, Task

InputBody = EditRequest | VariationRequest


@dataclass(frozen=True)
class Inputs:
    """The body of a request, the image it begins with, and where to repaint that, or None."""

    body: InputBody
    image: ImageFile
    mask: ImageFile | None = None

    def to_generation(
        self, request_id: str, caller: Caller, model: ModelCapabilities
    ) -> GenerationRequest:
        """Return the request with everything left out filled in from `model`; draws a seed.

        Where no size is asked for, it is the image's own, or the nearest one of the model.
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
            image=self.image.content,
            mask_image=None if self.mask is None else self.mask.content,
            strength=filled.strength if self.body.strength is None else self.body.strength,
        )


def nearest_size(width: int, height: int, sizes: SizeRange) -> tuple[int, int]:
    """Return the size that an image of `width` x `height` is best served in.

    Its own if the model has it; else about as many pixels as the native size has, in the shape that
    is nearest to the image's.
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
    """Read a form with files, or JSON with addresses, and look at what the images are.

    Raises:
        UnsupportedMediaTypeError: it is neither.
        InvalidRequestError: names the field that is wrong or missing.
        ServerFullError: too many images are being fetched.
    """
    if declared_type(incoming.http, FORM, JSON) == FORM:
        form = await read_form(incoming.http)
        body = parse_fields(form.fields, body_class)
        files = form.files
    else:
        body = parse_body(await _json(incoming), body_class)
        files = {}
    images: list[Source] = [*files.pop("image", []), *files.pop("images", [])]
    images += [] if body.image is None else [body.image]
    images += [reference.image_url for reference in body.images or ()]
    masks: list[Source] = list(files.pop("mask", []))
    if isinstance(body, EditRequest) and body.mask is not None:
        masks.append(body.mask.image_url)
    if files:
        raise InvalidRequestError(f"unknown file {min(files)!r} (known: image, mask)", min(files))
    # Counted before any is decoded or fetched: each may take seconds.
    image, mask = _only("image", images), _only("mask", masks)
    if image is None:
        raise InvalidRequestError("image is required", "image")
    return _checked(incoming, body, await _files(incoming, image, mask))


Source = bytes | str
"""A file, or where it is."""


async def _files(incoming: Incoming, image: Source, mask: Source | None) -> dict[str, bytes]:
    """The files by field, fetched where they are elsewhere: all at once, and in one turn."""
    sources = {"image": image} | ({} if mask is None else {"mask": mask})
    files = {field: source for field, source in sources.items() if isinstance(source, bytes)}
    addresses = {field: source for field, source in sources.items() if isinstance(source, str)}
    limits = incoming.settings.uploads
    if not any(map(is_elsewhere, addresses.values())):
        # Without letting others in between: while texts are decoded they are held several times.
        for field, address in addresses.items():
            files[field] = await fetch_image(address, field, limits)
        return files
    async with incoming.fetches.turn(limits.fetch_timeout_s):
        incoming.hold.grow(limits.max_bytes * len(addresses))
        fetched = await _fetch_all(addresses, limits)
    incoming.hold.change(sum(map(len, fetched.values())) - limits.max_bytes * len(addresses))
    return files | fetched


async def _fetch_all(addresses: dict[str, str], limits: UploadSettings) -> dict[str, bytes]:
    try:
        async with asyncio.TaskGroup() as group:
            fetching = {
                field: group.create_task(fetch_image(address, field, limits))
                for field, address in addresses.items()
            }
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {field: task.result() for field, task in fetching.items()}


def _checked(incoming: Incoming, body: InputBody, files: dict[str, bytes]) -> Inputs:
    limits = incoming.settings.uploads
    image = read_upload(files["image"], "image", limits)
    bare = _without_files(body)
    if "mask" not in files:
        return Inputs(bare, image)
    mask = read_upload(files["mask"], "mask", limits)
    if (mask.width, mask.height) != (image.width, image.height):
        raise InvalidRequestError(
            f"mask is {mask.width}x{mask.height} pixels and image "
            f"{image.width}x{image.height}: they must be equal",
            "mask",
        )
    return Inputs(bare, image, mask)


def _without_files(body: InputBody) -> InputBody:
    """The body with nothing where it had files as texts: these are as long, and kept else."""
    kept = {"image": body.image, "images": body.images, "mask": getattr(body, "mask", None)}
    emptied = {field: _emptied(value) for field, value in kept.items() if value is not None}
    return body.model_copy(update=emptied)


def _emptied(value: Any) -> Any:
    if isinstance(value, list):
        return [_emptied(item) for item in value]
    if isinstance(value, ImageReference):
        return value.model_copy(update={"image_url": ""})
    return ""


async def _json(incoming: Incoming) -> object:
    try:
        return json.loads(await incoming.http.body())
    except (ValueError, RecursionError) as error:
        raise MalformedJsonError("the body is not valid JSON in UTF-8") from error
    finally:
        # Kept by Starlette as long as the request else, beside the files that it holds.
        incoming.http._body = b""


def _only(field: str, sources: Sequence[Source]) -> Source | None:
    if len(sources) > 1:
        raise InvalidRequestError(f"{field} must be one image, got {len(sources)}", field)
    return sources[0] if sources else None
