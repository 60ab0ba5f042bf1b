"""The bodies of requests for images, and the images that they bring along."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic

from stepserve.api.auth.keys import Caller
from stepserve.api.bodies.forms import Form, parse_body, parse_fields, read_form
from stepserve.api.bodies.names import hint
from stepserve.api.bodies.reading import JSON
from stepserve.api.bodies.schemas import (
    ControlBody,
    ImageReference,
    ImageRequestBase,
    ReferenceImageBody,
)
from stepserve.api.dependencies import FORM, Incoming, declared_type
from stepserve.api.errors import MalformedJsonError
from stepserve.api.images.sizes import nearest_size, upscaled_size
from stepserve.api.images.slots import PLACED, Body, Slot, placed_in, with_entries
from stepserve.api.inputs.fetch import fetch_image, is_elsewhere
from stepserve.api.inputs.uploads import read_upload
from stepserve.config import UploadSettings
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.image_files.structure import ImageFile
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.requests import ControlUse, GenerationRequest, ReferenceUse
from stepserve.domain.tasks import MAX_IMAGES, Role, Task


@dataclass(frozen=True)
class Sent(Generic[Body]):
    """The body of a request, and the images that came with it, as they came.

    Args:
        body: without its images, which are as long as everything else together.
        slots: the images by role, each in the order that it was sent in.
    """

    body: Body
    slots: tuple[Slot, ...]

    def given(self) -> dict[Role, int]:
        """How many inputs of each role were sent."""
        counts: Counter[Role] = Counter(slot.role for slot in self.slots)
        values = {role: getattr(self.body, role, None) for role in ROLES_IN_BODIES}
        values[Role.PROMPT] = values[Role.PROMPT] or getattr(self.body, "prompts", None)
        return {**counts, **{role: 1 for role, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Inputs(Generic[Body]):
    """The body of a request, and the images that came with it, by role and in order."""

    body: Body
    files: Mapping[Role, tuple[ImageFile, ...]]

    def to_generation(
        self, request_id: str, caller: Caller, model: ModelCapabilities, task: Task
    ) -> GenerationRequest:
        """Return the request with everything left out filled in from `model`; draws a seed.

        Where no size is asked for, it is the first image's own, or the nearest one of the model;
        that of an upscaled image always follows from the image.

        Raises:
            InvalidRequestError: the model does not upscale images of that size.
        """
        images, mask = self.files.get(Role.IMAGE, ()), self.files.get(Role.MASK, ())
        filled = self.body.fill_in(request_id, caller, model, task)
        if images and task is Task.UPSCALING:
            width, height = upscaled_size(images[0], self.body.size, model)
            filled = replace(filled, width=width, height=height)
        elif images and self.body.size in (None, "auto"):
            width, height = nearest_size(images[0].width, images[0].height, model.sizes)
            filled = replace(filled, width=width, height=height)
        if images and not filled.prompt and self.body.guidance_scale is None:
            # Guidance leads towards the prompt: without one it would only cost.
            filled = replace(filled, guidance_scale=1.0)
        return replace(
            filled,
            images=tuple(file.content for file in images),
            mask=mask[0].content if mask else None,
            controls=tuple(self._controls(model)),
            references=tuple(self._references()),
        )

    def _controls(self, model: ModelCapabilities) -> Iterator[ControlUse]:
        files = self.files.get(Role.CONTROL, ())
        usual = {control.name: control.preprocessor for control in model.controls}
        only = next(iter(usual)) if len(usual) == 1 else ""
        for use, file in zip(self.body.controls or (), files, strict=True):
            name = use.name or only
            own = usual.get(name, "") if use.preprocessor is None else use.preprocessor
            yield ControlUse(name, file.content, use.scale, use.start, use.end, own)

    def _references(self) -> Iterator[ReferenceUse]:
        files = self.files.get(Role.REFERENCE, ())
        for use, file in zip(self.body.references or (), files, strict=True):
            yield ReferenceUse(file.content, use.scale, use.adapter)


ROLES_IN_BODIES = (
    Role.PROMPT,
    Role.CLASS_LABEL,
    Role.STRENGTH,
    Role.IMAGE_GUIDANCE,
    Role.NOISE_LEVEL,
    Role.HIRES,
)
"""Those that are no images."""

FILES: Mapping[str, Role] = MappingProxyType(
    {"image": Role.IMAGE, "images": Role.IMAGE, "mask": Role.MASK}
)
"""Which fields of a form are files, and what for."""


async def read_sent(incoming: Incoming, body_class: type[Body]) -> Sent[Body]:
    """Read a form with files, or JSON with addresses; nothing is fetched.

    Raises:
        UnsupportedMediaTypeError: it is neither.
        InvalidRequestError: names the field that is wrong or missing.
    """
    files: Mapping[str, Sequence[bytes]] | None = None
    if declared_type(incoming.http, FORM, JSON) == FORM:
        form = await read_form(incoming.http)
        body = parse_fields(form.fields, body_class, form.nested)
        slots = _files_of(form, body_class)
        files = form.files
    else:
        body = parse_body(await _json(incoming), body_class)
        slots = []
    slots += _addresses_in(body)
    for placed in PLACED:
        given = None if files is None else files.get(placed.files, ())
        body = with_entries(body, placed, given or ())
        slots += placed_in(body, placed, given)
    images = sum(slot.role is Role.IMAGE for slot in slots)
    if images > MAX_IMAGES:
        raise InvalidRequestError(f"image must be 1 to {MAX_IMAGES} images, got {images}", "image")
    return Sent(_without_files(body), tuple(slots))


async def read_inputs(incoming: Incoming, sent: Sent[Body]) -> Inputs[Body]:
    """Fetch the images that are elsewhere, and look at what all of them are.

    Call it once their number is known to be right: each may take seconds.

    Raises:
        InvalidRequestError: names the field that is wrong.
        ServerFullError: too many images are being fetched.
    """
    contents = await _contents(incoming, sent.slots)
    return Inputs(sent.body, _looked_at(incoming, sent.slots, contents))


def _files_of(form: Form, body_class: type[ImageRequestBase]) -> list[Slot]:
    known = [name for name in FILES if name in body_class.model_fields]
    taken = [*known, *(placed.files for placed in PLACED)]
    if unknown := sorted(set(form.files) - set(taken)):
        name, listed = unknown[0], ", ".join(taken)
        is_text = name in body_class.model_fields
        what = "; send it as a text, not as a file" if is_text else hint(name, taken)
        raise InvalidRequestError(f"unknown file {name!r}{what} (known: {listed})", name)
    return [
        Slot(FILES[name], FILES[name], file) for name in known for file in form.files.get(name, ())
    ]


def _addresses_in(body: ImageRequestBase) -> list[Slot]:
    """The images of a body by their addresses, in order."""
    image, mask = getattr(body, "image", None), getattr(body, "mask", None)
    images = [*([] if image is None else [image]), *(getattr(body, "images", None) or ())]
    slots = [Slot(Role.IMAGE, Role.IMAGE, reference.image_url) for reference in images]
    return slots if mask is None else [*slots, Slot(Role.MASK, Role.MASK, mask.image_url)]


async def _contents(incoming: Incoming, slots: Sequence[Slot]) -> list[bytes]:
    """The files, fetched where they are elsewhere: all at once, and in one turn."""
    limits = incoming.settings.uploads
    addresses = [slot for slot in slots if isinstance(slot.source, str)]
    elsewhere = any(is_elsewhere(str(slot.source)) for slot in addresses)
    if not elsewhere:
        # Without letting others in between: while texts are decoded they are held several times.
        return [await _content(slot, limits) for slot in slots]
    async with incoming.fetches.turn(limits.fetch_timeout_s):
        incoming.hold.grow(limits.max_bytes * len(addresses))
        contents = await _fetch_all(slots, limits)
    fetched = sum(len(c) for slot, c in zip(slots, contents, strict=True) if slot in addresses)
    incoming.hold.change(fetched - limits.max_bytes * len(addresses))
    return contents


async def _content(slot: Slot, limits: UploadSettings) -> bytes:
    if isinstance(slot.source, bytes):
        return slot.source
    return await fetch_image(slot.source, slot.field, limits)


async def _fetch_all(slots: Sequence[Slot], limits: UploadSettings) -> list[bytes]:
    try:
        async with asyncio.TaskGroup() as group:
            fetching = [group.create_task(_content(slot, limits)) for slot in slots]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in fetching]


def _looked_at(
    incoming: Incoming, slots: Sequence[Slot], contents: Sequence[bytes]
) -> dict[Role, tuple[ImageFile, ...]]:
    limits = incoming.settings.uploads
    files: dict[Role, tuple[ImageFile, ...]] = {}
    for slot, content in zip(slots, contents, strict=True):
        file = read_upload(content, slot.field, limits)
        files[slot.role] = (*files.get(slot.role, ()), file)
    _check_pixels([file for each in files.values() for file in each], slots, limits)
    _check_mask(files)
    return files


def _check_pixels(
    files: Sequence[ImageFile], slots: Sequence[Slot], limits: UploadSettings
) -> None:
    """They are decoded together, and kept until the request ends."""
    pixels = sum(file.width * file.height for file in files)
    if pixels > limits.max_total_pixels:
        raise InvalidRequestError(
            f"the {len(files)} images of the request have {pixels} pixels together; the limit is "
            f"{limits.max_total_pixels} pixels: send smaller ones, or fewer",
            slots[0].field,
        )


def _check_mask(files: Mapping[Role, Sequence[ImageFile]]) -> None:
    for mask in files.get(Role.MASK, ()):
        for image in files.get(Role.IMAGE, ())[:1]:
            if (mask.width, mask.height) != (image.width, image.height):
                raise InvalidRequestError(
                    f"mask is {mask.width}x{mask.height} pixels and image "
                    f"{image.width}x{image.height}: they must be equal",
                    "mask",
                )


def _without_files(body: Body) -> Body:
    """The body with nothing where it had files as texts: these are as long, and kept else."""
    values = {name: getattr(body, name) for name in type(body).model_fields}
    emptied = {name: _emptied(value) for name, value in values.items()}
    return body.model_copy(update={n: value for n, value in emptied.items() if value != values[n]})


def _emptied(value: Any) -> Any:
    if isinstance(value, list):
        return [_emptied(item) for item in value]
    if isinstance(value, ImageReference):
        return value.model_copy(update={"image_url": ""})
    if isinstance(value, ReferenceImageBody | ControlBody):
        return value.model_copy(update={"image": _emptied(value.image)})
    return value


async def _json(incoming: Incoming) -> object:
    body = await incoming.http.body()
    # Kept by Starlette as long as the request else, beside the files that it holds.
    incoming.http._body = b""
    if not body:
        raise InvalidRequestError("the body must be a JSON object")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        where = f"{error.msg} (at character {error.pos})"
        raise MalformedJsonError(f"the body is not valid JSON: {where}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedJsonError("the body is not valid JSON in UTF-8") from error
