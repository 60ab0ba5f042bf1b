"""Reading call arguments generically: everything in them, and how each part may be shared."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch

Path = tuple[Hashable, ...]

# Keep their precision when promoted to one another; half precision would round a timestep of 999.
PROMOTABLE = frozenset(
    {torch.int16, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64}
)

SIMPLE = frozenset({type(None), bool, int, float, str})


class ArgumentKind(Enum):
    """How one part of the arguments behaves when calls are stacked.

    - CONTAINER: a tuple, list or dict; the same type and keys required, and read part by part.
    - BATCHED: a tensor whose leading size is the row count; stacked along that dimension.
    - PER_ROW: a number (no dimension, or one element) or one number a row, such as timesteps;
      repeated for each row where there is only one, and stacked.
    - SHARED: a tensor of another leading size; equal content required, passed once.
    - PLAIN: anything else; must be equal (where it cannot be compared: the same object).

    Only arguments that a rule names are read as one of these:

    - IGNORED: has no influence on the result; the first call's is passed.
    - REPEATED: a tensor with several entries for each row, such as one a frame; stacked.
    - LAYERED: a tensor whose rows are its second dimension, such as states of many layers; stacked
      along that dimension.
    - ROW_LIST: a Python list with one entry a row; the lists are joined.
    """

    CONTAINER = "container"
    BATCHED = "batched"
    PER_ROW = "per_row"
    SHARED = "shared"
    PLAIN = "plain"
    IGNORED = "ignored"
    REPEATED = "repeated"
    LAYERED = "layered"
    ROW_LIST = "row_list"


@dataclass(frozen=True)
class ArgumentRules:
    """What cannot be told from the arguments of a method themselves, by parameter name.

    Args:
        ignored: do not influence the result.
        shared: their tensors serve all rows, whatever their leading size. Without this, a tensor
            whose leading size happens to be the row count looks BATCHED.
        repeated: their tensors have several entries for each row.
        layered: their tensors have the rows in the second dimension.
        row_lists: lists with one entry a row.
    """

    ignored: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    layered: frozenset[str] = frozenset()
    row_lists: frozenset[str] = frozenset()

    def kind_of(self, name: Hashable) -> ArgumentKind | None:
        """How the argument of that name is read, if a rule says so."""
        return self._kinds.get(name)

    @cached_property
    def _kinds(self) -> dict[Hashable, ArgumentKind]:
        named = {
            ArgumentKind.IGNORED: self.ignored,
            ArgumentKind.SHARED: self.shared,
            ArgumentKind.REPEATED: self.repeated,
            ArgumentKind.LAYERED: self.layered,
            ArgumentKind.ROW_LIST: self.row_lists,
        }
        return {name: kind for kind, names in named.items() for name in names}


def walk(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """A value and everything inside it, with the path that leads to each; outermost first."""
    found: list[tuple[Path, Any]] = []
    _collect(value, path, found)
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


def classify(value: Any, rows: int, ruled: ArgumentKind | None = None) -> ArgumentKind:
    """How one part of a call of `rows` rows behaves when it is stacked with others.

    Args:
        value: the part.
        rows: of the call.
        ruled: what a rule says of the argument that the part belongs to.
    """
    if not isinstance(value, torch.Tensor):
        container = isinstance(value, dict | tuple | list)
        return ArgumentKind.CONTAINER if container else ArgumentKind.PLAIN
    if ruled is not None:
        return ruled
    if value.dim() == 0 or (value.dim() == 1 and value.shape[0] in (1, rows)):
        return ArgumentKind.PER_ROW
    return ArgumentKind.BATCHED if value.shape[0] == rows else ArgumentKind.SHARED


def describe(kind: ArgumentKind, value: Any, rows: int) -> Hashable:
    """What must agree between calls that share a forward."""
    if kind is ArgumentKind.PLAIN:
        return describe_plain(value)
    if kind is ArgumentKind.BATCHED:
        return value.dtype, value.shape[1:], value.device
    if kind is ArgumentKind.PER_ROW:
        return "number" if value.dtype in PROMOTABLE else value.dtype, value.device
    if kind is ArgumentKind.SHARED:
        return value.dtype, value.shape, value.device, content_digest(value)
    if kind is ArgumentKind.REPEATED:
        return value.dtype, value.shape[1:], value.device, value.shape[0] / rows
    if kind is ArgumentKind.LAYERED:
        return value.dtype, (value.shape[0], *value.shape[2:]), value.device
    if kind is ArgumentKind.ROW_LIST:
        return frozenset(_describe_entry(entry) for entry in value)
    return id(type(value)) if kind is ArgumentKind.CONTAINER else None


def _describe_entry(entry: Any) -> Hashable:
    """One entry of a list with one entry a row: tensors by shape, all else by value."""
    return tuple(
        (path, value.dtype, value.shape, value.device)
        if isinstance(value, torch.Tensor)
        else (
            path,
            describe_plain(type(value) if isinstance(value, dict | tuple | list) else value),
        )
        for path, value in walk(entry)
    )


def outline(value: Any) -> Hashable | None:
    """All that can be told of arguments without looking into tensors; None if they hold objects.

    Where no tensor is SHARED, arguments of equal outlines are described equally.
    """
    parts: list[Hashable] = []
    return tuple(parts) if _outline(value, parts) else None


def _outline(value: Any, parts: list[Hashable]) -> bool:
    # Taken for every call of every step. Each part says its type first and containers their size,
    # so that no two values read the same.
    if isinstance(value, torch.Tensor):
        parts += (value.dtype, value.shape, value.device)
        return True
    kind: Any = type(value)
    if kind in SIMPLE:
        parts += (kind, value)
        return True
    if not isinstance(value, dict | tuple | list):
        # Comparing it might mean anything, and keeping it in an outline would keep it alive.
        return False
    parts += (kind, len(value))
    if isinstance(value, dict):
        parts += value
        value = value.values()
    return all(_outline(item, parts) for item in value)


def leading_size(value: Any) -> int | None:
    """Leading size of the first tensor with dimensions in `value`; None where there is none."""
    if isinstance(value, torch.Tensor):
        return max(value.shape[0], 1) if value.dim() else None
    for _, part in walk(value):
        if isinstance(part, torch.Tensor) and part.dim() > 0:
            return max(part.shape[0], 1)
    return None


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
