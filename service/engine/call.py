"""A parked module call, and the key that says which calls may share one forward.

The row count of a call is the leading size of its first tensor that has dimensions, positional
arguments first, then keyword arguments by name. `leaves.LeafKind` lists how each part of the
arguments is then treated.

One ambiguity cannot be told from the arguments: a tensor that all rows share, but whose leading
size happens to be the row count, looks BATCHED. Name such keyword arguments in `shared`. Python
numbers are PLAIN, because they may as well be settings: calls share a forward only if they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from service.engine.leaves import Ignored, LeafKind, Path, classify, describe, walk
from service.engine.memo import Memo


@dataclass(frozen=True)
class ParkableMethod:
    """One method of one resident module that many requests may share.

    Args:
        module: name of the module in the pipeline, such as `unet`.
        method: name of the method, such as `forward` or `decode`.
        run: the original method.
        stage: what its time is counted as.
        ignored: keyword arguments that do not influence the result.
        shared: keyword arguments whose tensors serve all rows, whatever their leading size.
        max_rows: most rows that one shared forward may have.
        enter: sets the module to a variant before a forward of calls that want it.
        memo: keeps outputs, so that a call whose arguments were seen before is answered at once.
    """

    module: str
    method: str
    run: Callable[..., Any]
    stage: str = "denoise"
    ignored: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    max_rows: int = 32
    enter: Callable[[Hashable], None] | None = None
    memo: Memo | None = None

    @property
    def name(self) -> str:
        """`unet.forward`."""
        return f"{self.module}.{self.method}"


@dataclass(frozen=True)
class CallKey:
    """Calls with equal keys may share a forward. Row counts, prompts and seeds stay out of it."""

    method: str
    leaves: tuple[tuple[Path, LeafKind, Hashable], ...]
    variant: Hashable = None

    @cached_property
    def shape(self) -> tuple[Hashable, ...]:
        """What decides the cost of a row: the method, and dtype and shape of what is batched."""
        batched = (text for _, kind, text in self.leaves if kind is LeafKind.BATCHED)
        return (self.method, *batched)


@dataclass(frozen=True, eq=False)
class Call:
    """One call as a track made it. `sequence` orders calls by the time they were parked.

    `module_variant` is what the module must be set to. The key's variant says at least as much: it
    also keeps isolated work apart.
    """

    method: ParkableMethod
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: CallKey
    rows: int
    sequence: int = 0
    module_variant: Hashable = None

    def enter(self) -> None:
        """Set the module to the variant that this call wants."""
        if self.method.enter is not None:
            self.method.enter(self.module_variant)


def make_call(
    method: ParkableMethod,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sequence: int = 0,
    variant: Hashable = None,
    module_variant: Hashable = None,
) -> Call:
    """Describe a module call so that it can be compared and stacked with others."""
    considered = {k: Ignored.IGNORED if k in method.ignored else v for k, v in kwargs.items()}
    parts = walk((args, considered))
    rows = _rows_of(parts, method.shared)
    described = []
    for path, value in parts:
        always_shared = bool(method.shared) and _keyword(path) in method.shared
        kind = classify(value, rows, always_shared)
        described.append((path, kind, describe(kind, value)))
    key = CallKey(method.name, tuple(described), variant)
    return Call(method, args, kwargs, key, rows, sequence, module_variant)


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Leading size of the first tensor with dimensions; 1 where there is none or it is empty."""
    return _rows_of(walk((args, kwargs)), frozenset())


def _rows_of(parts: list[tuple[Path, Any]], shared: frozenset[str]) -> int:
    for path, value in parts:
        if isinstance(value, torch.Tensor) and value.dim() > 0 and _keyword(path) not in shared:
            return max(value.shape[0], 1)
    return 1


def _keyword(path: Path) -> Hashable:
    """The keyword argument that a path of `walk((args, kwargs))` leads into, or None."""
    return path[1] if len(path) > 1 and path[0] == 1 else None
