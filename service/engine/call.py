"""A parked module call, and the key that says which calls may share one forward.

Arguments are read generically. The row count of a call is the leading size of its first tensor
argument. Every leaf of its arguments is then one of:

- BATCHED: a tensor whose leading size is the row count; stacked along that dimension.
- SCALAR: a number-like tensor of one element (a timestep); repeated for each row and stacked.
- SHARED: a tensor of another leading size; equal content required, passed once.
- PLAIN: anything else; must be equal (unhashable or unknown objects: the same object).
- IGNORED: an argument named as having no influence on the result; passed from the first call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

Path = tuple[str | int, ...]


class LeafKind(Enum):
    """How one argument leaf behaves when calls are stacked."""

    BATCHED = "batched"
    SCALAR = "scalar"
    SHARED = "shared"
    PLAIN = "plain"
    IGNORED = "ignored"


@dataclass(frozen=True)
class ParkableMethod:
    """One method of one resident module that many requests may share.

    Args:
        module: name of the module in the pipeline, such as `unet`.
        method: name of the method, such as `forward` or `decode`.
        run: the original method.
        stage: what its time is counted as.
        ignored: keyword arguments that do not influence the result.
        max_rows: most rows that one shared forward may have.
    """

    module: str
    method: str
    run: Callable[..., Any]
    stage: str = "denoise"
    ignored: frozenset[str] = frozenset()
    max_rows: int = 32

    @property
    def name(self) -> str:
        """`unet.forward`."""
        return f"{self.module}.{self.method}"


@dataclass(frozen=True)
class CallKey:
    """Calls with equal keys may share a forward. Row counts, prompts and seeds stay out of it."""

    method: str
    leaves: tuple[tuple[Path, LeafKind, Hashable], ...]

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """What decides the cost of a row: the method and the shapes of the batched tensors."""
        batched = (kind[1] for _, leaf, kind in self.leaves if leaf is LeafKind.BATCHED)  # type: ignore[index]
        return (self.method, *batched)


@dataclass(frozen=True, eq=False)
class Call:
    """One call as a track made it. `sequence` orders calls by the time they were parked."""

    method: ParkableMethod
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: CallKey
    rows: int
    sequence: int = 0


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All leaves of nested tuples, lists and dicts, with the path that leads to each."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Leading size of the first tensor with dimensions, or 1 where there is none."""
    for _, value in leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1


def classify(path: Path, value: Any, rows: int, ignored: frozenset[str]) -> LeafKind:
    """How one leaf behaves when calls of `rows` rows are stacked."""
    if not ignored.isdisjoint(path):
        return LeafKind.IGNORED
    if not isinstance(value, torch.Tensor):
        return LeafKind.PLAIN
    if value.dim() == 0 or (value.dim() == 1 and value.shape[0] == 1 and rows != 1):
        return LeafKind.SCALAR
    return LeafKind.BATCHED if value.shape[0] == rows else LeafKind.SHARED


def describe(kind: LeafKind, value: Any) -> Hashable:
    """The part of a leaf that must agree between calls that share a forward."""
    if kind is LeafKind.IGNORED:
        return None
    if kind is LeafKind.SCALAR:
        return str(value.device)
    if kind is LeafKind.BATCHED:
        return str(value.dtype), tuple(value.shape[1:]), str(value.device)
    if kind is LeafKind.SHARED:
        return str(value.dtype), tuple(value.shape), content_digest(value)
    try:
        hash(value)
    except TypeError:
        return "object", id(value)
    return type(value).__name__, value


def content_digest(value: torch.Tensor) -> bytes:
    """A digest of a tensor's bytes, for any dtype."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).digest()


def make_call(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any], sequence: int = 0
) -> Call:
    """Describe a module call so that it can be compared and stacked with others."""
    rows = count_rows(args, kwargs)
    described = []
    for path, value in leaves((args, kwargs)):
        kind = classify(path, value, rows, method.ignored)
        described.append((path, kind, describe(kind, value)))
    return Call(method, args, kwargs, CallKey(method.name, tuple(described)), rows, sequence)
