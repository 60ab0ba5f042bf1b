"""Places for images in the bodies of requests, and what fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from stepserve.api.bodies.schemas import ControlBody, ImageRequestBase, ReferenceImageBody
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.tasks import Role

Body = TypeVar("Body", bound=ImageRequestBase)
Source = bytes | str
"""A file, or where it is."""


@dataclass(frozen=True)
class Slot:
    """One image that a request brings along.

    Args:
        role: what it is for.
        field: what messages call it.
        source: the file, or where it is.
    """

    role: Role
    field: str
    source: Source


@dataclass(frozen=True)
class Placed:
    """A list of a body whose entries have an image each.

    Args:
        role: what the images are for, and what the list is called.
        files: the files of a form that take the places of images which are left out.
        entry: makes an entry that says nothing.
    """

    role: Role
    files: str
    entry: type[ReferenceImageBody | ControlBody]

    def entries(self, body: ImageRequestBase) -> Sequence[ReferenceImageBody | ControlBody]:
        """What a body has in the list."""
        return getattr(body, self.role) or ()


PLACED = (
    Placed(Role.REFERENCE, "reference_image", ReferenceImageBody),
    Placed(Role.CONTROL, "control_image", ControlBody),
)


def with_entries(body: Body, placed: Placed, files: Sequence[bytes]) -> Body:
    """The body with an entry for each file, where a form has files alone."""
    if getattr(body, placed.role) is not None or not files:
        return body
    return body.model_copy(update={placed.role.value: [placed.entry() for _ in files]})


def placed_in(body: ImageRequestBase, placed: Placed, files: Sequence[bytes] | None) -> list[Slot]:
    """The images of a list by address or, where an entry has none, the next of the files.

    Args:
        files: those of a form; None where the body is JSON.

    Raises:
        InvalidRequestError: there are more files than entries without an image, or fewer.
    """
    entries = placed.entries(body)
    _check_files(placed, [i for i, entry in enumerate(entries) if entry.image is None], files)
    left = iter(files or ())
    return [
        Slot(
            placed.role,
            f"{placed.role}[{index}].image",
            next(left) if entry.image is None else entry.image.image_url,
        )
        for index, entry in enumerate(entries)
    ]


def _check_files(placed: Placed, without: Sequence[int], files: Sequence[bytes] | None) -> None:
    """`without`: the entries that have no image of their own."""
    sent = len(files or ())
    if sent < len(without):
        place = f"{placed.role}[{without[sent]}].image"
        file = f", or a file {placed.files} for each entry without one (got {sent})"
        how = "send a 'data:' URL" + ("" if files is None else file)
        raise InvalidRequestError(f"{place} is required: {how}", place)
    if sent > len(without):
        raise InvalidRequestError(
            f"{placed.files} must be one file for each entry of {placed.role} without an image, "
            f"which {len(without)} are; got {sent}",
            placed.files,
        )
