"""Reading call arguments generically: every value in them, and how each may be shared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import optree
import torch
from optree import PyTreeSpec

from stepserve.engine.calls.objects import UnsplittableError, flatten_output
from stepserve.engine.calls.text_padding import TextPadding

# Keep their precision when promoted to one another; half precision would round a timestep of 999.
PROMOTABLE = frozenset(
    {torch.int16, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64}
)

SIMPLE = frozenset({type(None), bool, int, float, str})


class ArgumentKind(Enum):
    """How one value in the arguments behaves when calls are stacked.

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
    - CACHE: an object whose tensors have one leading entry a row, which the forward reads or fills,
      such as keys and values of earlier steps; joined, and what is written into it is handed back.
    """

    BATCHED = "batched"
    PER_ROW = "per_row"
    SHARED = "shared"
    PLAIN = "plain"
    IGNORED = "ignored"
    REPEATED = "repeated"
    LAYERED = "layered"
    ROW_LIST = "row_list"
    CACHE = "cache"


@dataclass(frozen=True)
class ArgumentRules:
    """What cannot be read off the arguments of a method themselves, by parameter name.

    Args:
        ignored: do not influence the result.
        shared: their tensors serve all rows, whatever their leading size. Without this, a tensor
            whose leading size happens to be the row count looks BATCHED.
        repeated: their tensors have several entries for each row.
        layered: their tensors have the rows in the second dimension.
        row_lists: lists with one entry a row.
        row_tokens: where the forward takes rows of any lengths, and fills them up to the longest:
            by the name of a list, how many tokens it makes of a tensor in an entry, rounded as the
            forward does. Then the entries of all row lists may have any shape. Empty: they agree.
        mixes_lengths: whether rows of different lengths may share a forward. If not, those do
            whose entries make equally many tokens in each list.
        caches: objects that forwards read tensors from, or write them into, one entry a row.
        residuals: their tensors are only added to activations, so that calls without them may
            share a forward with calls that have them; see `residuals`.
        residual_settings: have no influence but on how residuals are added.
        whole_lists_out: lists in the output hold tensors of all rows, even where they have one
            entry a row by chance.
        output_scale: the number that all of the output is multiplied with at the end, so that
            calls with different ones may share a forward; empty: there is none.
        text: what is filled up so that texts of any length share; see `text_padding`.
    """

    ignored: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    layered: frozenset[str] = frozenset()
    row_lists: frozenset[str] = frozenset()
    row_tokens: Mapping[str, Callable[[torch.Tensor], int]] = field(default_factory=dict)
    mixes_lengths: bool = True
    caches: frozenset[str] = frozenset()
    residuals: frozenset[str] = frozenset()
    residual_settings: frozenset[str] = frozenset()
    whole_lists_out: bool = False
    output_scale: str = ""
    text: tuple[TextPadding, ...] = ()

    @cached_property
    def whole(self) -> frozenset[str]:
        """Arguments that are not read part by part, where they are lists."""
        return self.ignored | self.row_lists

    @property
    def cuts_lists(self) -> bool:
        """Whether lists with one entry a row in the output are cut like tensors."""
        return bool(self.row_lists) and not self.whole_lists_out

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
            ArgumentKind.CACHE: self.caches,
        }
        return {name: kind for kind, names in named.items() for name in names}


def flatten(
    value: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], PyTreeSpec]:
    """Every value inside tuples, lists and dicts, and the structure of those.

    None is a value, and so is a container of any other type.
    """
    return optree.tree_flatten(value, is_leaf, none_is_leaf=True)


def unflatten(structure: PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """What `flatten` has taken apart, with these values."""
    return structure.unflatten(leaves)


def classify(value: Any, rows: int, ruled: ArgumentKind | None = None) -> ArgumentKind:
    """How one value in a call of `rows` rows behaves when it is stacked with others.

    Args:
        value: no tuple, list or dict.
        rows: of the call.
        ruled: what a rule says of the argument that the value belongs to.
    """
    if ruled is ArgumentKind.IGNORED or (ruled is ArgumentKind.ROW_LIST and type(value) is list):
        return ruled
    if not isinstance(value, torch.Tensor):
        is_cache = ruled is ArgumentKind.CACHE and _holds_rows(value, rows)
        return ArgumentKind.CACHE if is_cache else ArgumentKind.PLAIN
    if ruled not in (None, ArgumentKind.ROW_LIST):
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
    return _OF_OBJECTS[kind](value) if kind in _OF_OBJECTS else None


def _holds_rows(value: Any, rows: int) -> bool:
    """Whether that is an object whose every tensor, if it has any yet, has that many rows."""
    if type(value) in SIMPLE:
        return False
    try:
        leaves, _ = flatten_output(value)
    except UnsplittableError:
        return False
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return all(tensor.dim() > 0 and tensor.shape[0] == rows for tensor in tensors)


def _describe_cache(value: Any) -> Hashable:
    """The object's type, where its values stand, and of each tensor all but its rows."""
    leaves, structure = flatten_output(value)
    cls: Any = type(value)
    return (
        cls,
        tuple(structure.paths()),
        *(
            (leaf.dtype, leaf.shape[1:], leaf.device)
            if isinstance(leaf, torch.Tensor)
            else describe_plain(leaf)
            for leaf in leaves
        ),
    )


def row_entry(entry: Any) -> Any:
    """One entry of a list with one entry a row, in one form.

    Pipelines of one family differ: for a row with a single image some give its size, and some a
    list with its size.
    """
    is_sole = type(entry) is list and len(entry) == 1 and type(entry[0]) is tuple
    return entry[0] if is_sole else entry


def _describe_entry(entry: Any) -> Hashable:
    """One entry of a list with one entry a row: tensors by shape, all else by value."""
    leaves, structure = flatten(row_entry(entry))
    return structure, *(
        (leaf.dtype, leaf.shape, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else describe_plain(leaf)
        for leaf in leaves
    )


def _describe_list(value: list[Any]) -> Hashable:
    return frozenset(map(_describe_entry, value))


def describe_forms(value: Any) -> Hashable:
    """What must agree of lists whose entries may have any shape: what kinds of values there are."""
    if isinstance(value, list | tuple):
        return frozenset(map(describe_forms, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim(), value.device
    return type(value).__qualname__


def count_tokens(entry: Any, tokens: Callable[[torch.Tensor], int]) -> int:
    """Of all tensors in one entry of a list with one entry a row."""
    leaves, _ = flatten(entry)
    return sum(tokens(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


_OF_OBJECTS: dict[ArgumentKind, Callable[[Any], Hashable]] = {
    ArgumentKind.ROW_LIST: _describe_list,
    ArgumentKind.CACHE: _describe_cache,
}


def outline(leaves: Sequence[Any], layout: Hashable) -> tuple[Hashable, ...] | None:
    """All that is known of arguments without reading tensors; None if they hold objects.

    Where no tensor is SHARED, arguments of equal outlines are described equally.
    """
    # Taken for every call of every step. Each value says its type first.
    parts: list[Any] = [layout]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts += (leaf.dtype, leaf.shape, leaf.device)
        elif type(leaf) in SIMPLE:
            parts += (type(leaf), leaf)
        elif type(leaf) is list and (entries := outline(*flatten(leaf))):
            parts.append(entries)
        else:
            # Comparing it might mean anything, and keeping it in an outline would keep it alive.
            return None
    return tuple(parts)


def content_digest(value: torch.Tensor) -> bytes:
    """A digest of a tensor's bytes, for any dtype and shape."""
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
