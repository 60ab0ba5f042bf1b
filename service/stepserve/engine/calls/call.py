"""A parked module call, and the key that says which calls may share one forward.

The row count of a call is the leading size of its first tensor that has dimensions, in the order of
the method's parameters. `leaves.LeafKind` lists how each part of the arguments is then treated, and
`leaves.ArgumentRules` what has to be said by name because the arguments themselves do not tell.

Python numbers are PLAIN, because they may as well be settings: calls share a forward only if they
agree.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stepserve.engine.calls.arguments import (
    ArgumentKind,
    ArgumentRules,
    Path,
    classify,
    describe,
    leading_size,
    outline,
    walk,
)

if TYPE_CHECKING:
    from stepserve.engine.calls.output_cache import OutputCache

Argument = tuple[Path, ArgumentKind, Hashable]
NO_RULES = ArgumentRules()
MOST_KNOWN_KEYS = 256


@dataclass(frozen=True)
class ParkableMethod:
    """One method of one resident module that many requests may share.

    Args:
        module: name of the module in the pipeline, such as `unet`.
        method: name of the method, such as `forward` or `decode`.
        run: the original method.
        stage: what its time is counted as.
        parameters: names of its parameters in their order, for arguments given by position.
        rules: how some of its arguments are to be read.
        max_rows: most rows that one shared forward may have.
        bucket_rows: forwards of fewer rows are filled up to the next of these row counts, for
            devices and kernels that gain from few shapes. Empty: any row count runs as it is.
        enter: sets the module to a variant before a forward of calls that want it.
        memo: keeps outputs, so that a call whose arguments were seen before is answered at once.
    """

    module: str
    method: str
    run: Callable[..., Any]
    stage: str = "denoise"
    parameters: tuple[str, ...] = ()
    rules: ArgumentRules = NO_RULES
    max_rows: int = 32
    bucket_rows: tuple[int, ...] = ()
    enter: Callable[[Hashable], None] | None = None
    memo: OutputCache | None = None

    @property
    def name(self) -> str:
        """`unet.forward`."""
        return f"{self.module}.{self.method}"

    def ordered(self, kwargs: dict[str, Any]) -> list[str]:
        """Names of keyword arguments in the order of the parameters; those that are none last."""
        names = tuple(kwargs)
        if names not in self._orders:
            known = {name: index for index, name in enumerate(self.parameters)}
            self._orders[names] = sorted(
                names, key=lambda name: (known.get(name, len(known)), name)
            )
        return self._orders[names]

    @cached_property
    def _orders(self) -> dict[tuple[str, ...], list[str]]:
        return {}

    @cached_property
    def known_keys(self) -> dict[Hashable, tuple[CallKey, int]]:
        """Keys and row counts by the outlines of arguments that were read before."""
        return {}

    def padded_rows(self, rows: int) -> int:
        """How many rows a forward of `rows` rows is run with."""
        return min((bucket for bucket in self.bucket_rows if bucket >= rows), default=rows)


@dataclass(frozen=True)
class CallKey:
    """Calls with equal keys may share a forward. Row counts, prompts and seeds stay out of it."""

    method: str
    leaves: tuple[Argument, ...]
    variant: Hashable = None

    # Looked up at every tick for every parked call.
    @cached_property
    def _hash(self) -> int:
        return hash((self.method, self.leaves, self.variant))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def shape(self) -> tuple[Hashable, ...]:
        """What decides the cost of a row: the method, and dtype and shape of what is batched.

        Where nothing is, the rows are a list, of which there may be one for prompts as well.
        """
        batched = [text for _, kind, text in self.leaves if kind is ArgumentKind.BATCHED]
        listed = [text for _, kind, text in self.leaves if kind is ArgumentKind.ROW_LIST]
        return (self.method, *(batched or listed[:1]))


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
    key, rows = _find_key(method, args, kwargs, variant)
    return Call(method, args, kwargs, key, rows, sequence, module_variant)


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Leading size of the first tensor with dimensions; 1 where there is none or it is empty."""
    method = ParkableMethod("", "", lambda: None)
    return _count_rows(method, list(_arguments(method, args, kwargs)))


def _find_key(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any], variant: Hashable
) -> tuple[CallKey, int]:
    """Key and row count of a call; steps of one size are read once, as they look the same."""
    outlined = outline((args, kwargs))
    if outlined is None:
        return _read_key(method, args, kwargs, variant)
    known = method.known_keys
    found = known.get((outlined, variant))
    if found is None:
        found = _read_key(method, args, kwargs, variant)
        # What is SHARED is told by its content, which is in no outline.
        if not any(kind is ArgumentKind.SHARED for _, kind, _ in found[0].leaves):
            if len(known) >= MOST_KNOWN_KEYS:
                known.clear()
            known[outlined, variant] = found
    return found


def _read_key(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any], variant: Hashable
) -> tuple[CallKey, int]:
    arguments = list(_arguments(method, args, kwargs))
    rows = _count_rows(method, arguments)
    leaves: list[Argument] = [((), ArgumentKind.CONTAINER, len(args))]
    for path, name, value in arguments:
        leaves += _read(value, path, rows, method.rules.kind_of(name))
    return CallKey(method.name, tuple(leaves), variant), rows


def _arguments(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Path, Hashable, Any]]:
    """Path, parameter name and value of each argument, in the order of the parameters."""
    names = method.parameters
    for index, value in enumerate(args):
        yield (0, index), names[index] if index < len(names) else None, value
    for name in method.ordered(kwargs):
        yield (1, name), name, kwargs[name]


def _count_rows(method: ParkableMethod, arguments: list[tuple[Path, Hashable, Any]]) -> int:
    for _, name, value in arguments:
        kind = method.rules.kind_of(name)
        if kind is ArgumentKind.ROW_LIST and isinstance(value, list):
            return max(len(value), 1)
        rows = leading_size(value) if kind is None else None
        if rows is not None:
            return rows
    return 1


def _read(value: Any, path: Path, rows: int, ruled: ArgumentKind | None) -> list[Argument]:
    """Everything in one argument, and how it behaves when calls are stacked."""
    if ruled is ArgumentKind.IGNORED:
        return [(path, ruled, None)]
    if ruled is ArgumentKind.ROW_LIST and isinstance(value, list):
        return [(path, ruled, describe(ruled, value, rows))]
    ruled = None if ruled is ArgumentKind.ROW_LIST else ruled
    parts = walk(value, path) if isinstance(value, dict | tuple | list) else [(path, value)]
    leaves = []
    for inner, part in parts:
        kind = classify(part, rows, ruled)
        leaves.append((inner, kind, describe(kind, part, rows)))
    return leaves
