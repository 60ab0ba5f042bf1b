"""Reading call arguments generically: everything in them, and how each part may be shared."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from enum import Enum
from typing import Any

import torch

Path = tuple[Hashable, ...]

# Keep their precision when promoted to one another; half precision would round a timestep of 999.
PROMOTABLE = frozenset(
    {torch.int16, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64}
)


class LeafKind(Enum):
    """How one part of the arguments behaves when calls are stacked.

    - CONTAINER: a tuple, list or dict; the same type and keys required, and read part by part.
    - BATCHED: a tensor whose leading size is the row count; stacked along that dimension.
    - PER_ROW: a number (no dimension, or one element) or one number a row, such as timesteps;
      repeated for each row where there is only one, and stacked.
    - SHARED: a tensor of another leading size; equal content required, passed once.
    - PLAIN: anything else; must be equal (where it cannot be compared: the same object).
    - IGNORED: an argument named as having no influence on the result; the first call's is passed.
    """

    CONTAINER = "container"
    BATCHED = "batched"
    PER_ROW = "per_row"
    SHARED = "shared"
    PLAIN = "plain"
    IGNORED = "ignored"


class Ignored(Enum):
    """Stands in for an argument that has no influence on the result."""

    IGNORED = "ignored"


def walk(value: Any) -> list[tuple[Path, Any]]:
    """A value and everything inside it, with the path that leads to each; outermost first."""
    found: list[tuple[Path, Any]] = []
    _collect(value, (), found)
    return found


def _collect(value: Any, path: Path, found: list[tuple[Path, Any]]) -> None:
    # Read for every call of every step: a list is filled faster than nested generators yield.
    found.append((path, value))
    if isinstance(value, dict):
        for key in sorted(value, key=_order):
            _collect(value[key], (*path, key), found)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _collect(item, (*path, index), found)


def classify(value: Any, rows: int, always_shared: bool = False) -> LeafKind:
    """How one part of a call of `rows` rows behaves when it is stacked with others."""
    if isinstance(value, dict | tuple | list):
        return LeafKind.CONTAINER
    if value is Ignored.IGNORED:
        return LeafKind.IGNORED
    if not isinstance(value, torch.Tensor):
        return LeafKind.PLAIN
    if always_shared:
        return LeafKind.SHARED
    if value.dim() == 0 or (value.dim() == 1 and value.shape[0] in (1, rows)):
        return LeafKind.PER_ROW
    return LeafKind.BATCHED if value.shape[0] == rows else LeafKind.SHARED


def describe(kind: LeafKind, value: Any) -> Hashable:
    """What must agree between calls that share a forward."""
    if kind is LeafKind.PLAIN:
        return describe_plain(value)
    if kind is LeafKind.BATCHED:
        return value.dtype, value.shape[1:], value.device
    if kind is LeafKind.PER_ROW:
        return "number" if value.dtype in PROMOTABLE else value.dtype, value.device
    if kind is LeafKind.SHARED:
        return value.dtype, value.shape, value.device, content_digest(value)
    return id(type(value)) if kind is LeafKind.CONTAINER else None


def content_digest(value: torch.Tensor) -> bytes:
    """A digest of a tensor's bytes, for any dtype."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).digest()


def describe_plain(value: Any) -> Hashable:
    """What must agree where a value is no tensor: itself, or else its being the same object."""
    try:
        hash(value)
    except TypeError:
        # The call keeps the object alive, so that no other one can have its id meanwhile.
        return "object", id(value)
    return type(value), value


def _order(key: Hashable) -> tuple[str, str]:
    """Any order will do, as long as it is the same for equal sets of keys of any types."""
    return type(key).__name__, repr(key)
