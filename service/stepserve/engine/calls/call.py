"""A parked module call, and the method that it parked at.

`call_key` says what is read off its arguments. An argument that is given as None, which is its
default, is as good as not given. What is only added to activations stays out of the key: see
`residuals`. Texts are filled up to one of a few lengths before the key is read: see `text_padding`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from stepserve.engine.calls.arguments import ArgumentKind, ArgumentRules, flatten, outline
from stepserve.engine.calls.call_key import (
    CallArguments,
    CallKey,
    CallShape,
    Layout,
    ReadKey,
    RowTokens,
    read_key,
)
from stepserve.engine.calls.residuals import (
    NO_RESIDUALS,
    Residuals,
    have_rows,
    read_residuals,
)

if TYPE_CHECKING:
    from stepserve.engine.calls.output_cache import OutputCache

NO_RULES = ArgumentRules()
MOST_KNOWN_KEYS = 256

VariantRows = tuple[Hashable, int]
"""A variant, and how many rows of one call want it, one after the other."""

Enter = Callable[[Sequence[VariantRows]], None]


@dataclass(frozen=True)
class ParkableMethod:
    """One method of one resident module that many requests may share.

    Args:
        module: name of the module in the pipeline, such as `unet`.
        method: name of the method, such as `forward` or `decode`.
        run: the original method.
        stage: what its time is counted as.
        parameters: names of its parameters in their order, for arguments given by position.
        optional: those of them whose default is None.
        rules: how some of its arguments are to be read.
        max_rows: most rows that one shared forward may have.
        bucket_rows: forwards of fewer rows are filled up to the next of these row counts, for
            devices and kernels that gain from few shapes. Empty: any row count runs as it is.
        enter: tells the module which variant each row of the next forward wants, in the order of
            the rows.
        output_cache: keeps outputs, so that a call with arguments of before need not run.
    """

    module: str
    method: str
    run: Callable[..., Any]
    stage: str = "denoise"
    parameters: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    rules: ArgumentRules = NO_RULES
    max_rows: int = 32
    bucket_rows: tuple[int, ...] = ()
    enter: Enter | None = None
    output_cache: OutputCache | None = None

    @property
    def name(self) -> str:
        """`unet.forward`."""
        return f"{self.module}.{self.method}"

    def given(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments without those that say nothing: None where that is the default."""
        silent = {name for name, value in kwargs.items() if value is None and name in self.optional}
        if not silent:
            return kwargs
        return {name: value for name, value in kwargs.items() if name not in silent}

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by the names of their parameters."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def with_named(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, Any]
    ) -> CallArguments:
        """The arguments with other values for those names, by position where they were so."""
        places = dict(zip(self.parameters, range(len(args)), strict=False))
        by_place = [values.get(name, args[place]) for name, place in places.items()]
        by_name = {name: value for name, value in values.items() if name not in places}
        return (*by_place, *args[len(places) :]), kwargs | by_name

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Layout]:
        """Every value in the arguments of a call, in the order of the parameters.

        Lists that a rule names are values themselves.
        """
        names = self._ordered(tuple(kwargs))
        tree = args, [kwargs[name] for name in names]
        is_leaf = self._is_whole(args, kwargs) if self.rules.whole else None
        leaves, structure = flatten(tree, is_leaf)
        return leaves, Layout(names, structure)

    def _is_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], bool]:
        named = [*zip(self.parameters, args, strict=False), *kwargs.items()]
        whole = {id(value) for name, value in named if name in self.rules.whole}
        return lambda part: id(part) in whole

    def names_in(self, layout: Layout) -> list[str]:
        """The name of the argument that each value belongs to; empty where it has none."""
        names = self.parameters, layout.names
        return [
            names[by_name][place] if place < len(names[by_name]) else ""
            for by_name, place, *_ in layout.structure.paths()
        ]

    def _ordered(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """In the order of the parameters; those that are none last."""
        if names not in self._orders:
            known = {name: index for index, name in enumerate(self.parameters)}
            order = sorted(names, key=lambda name: (known.get(name, len(known)), name))
            self._orders[names] = tuple(order)
        return self._orders[names]

    @cached_property
    def _orders(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        return {}

    @cached_property
    def known_keys(self) -> dict[Hashable, ReadKey]:
        """What was read of arguments before, by their outlines."""
        return {}

    def padded_rows(self, rows: int) -> int:
        """How many rows a forward of `rows` rows is run with."""
        return min((bucket for bucket in self.bucket_rows if bucket >= rows), default=rows)


@dataclass(frozen=True, eq=False)
class Call:
    """One call as a track made it. `sequence` orders calls by the time they were parked.

    `leaves` are the values in its arguments but the residuals, one for each of `key.arguments`.

    `module_variant` is what the module does for its rows. The key's variant is what keeps the call
    apart from others: that of isolated work does so as well, and a module that can do several
    variants in one forward needs none.

    `tokens` are there where rows of several lengths may share a forward; see `ReadKey`.
    """

    method: ParkableMethod
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: Sequence[Any]
    key: CallKey
    rows: int
    sequence: int = 0
    module_variant: Hashable = None
    residuals: Residuals = field(default_factory=dict)
    tokens: RowTokens = frozenset()

    @cached_property
    def length(self) -> int:
        """Tokens of its longest row; 0 where all rows that may share a forward have as many."""
        return max(map(sum, self.tokens), default=0)

    @cached_property
    def shape(self) -> CallShape:
        """What decides the cost of its rows."""
        return CallShape(self.key.form, self.length)

    def with_leaves(self, leaves: Sequence[Any], rows: int) -> Call:
        """The same call with other values of as many rows, and without residuals."""
        args, kwargs = self.key.layout.rebuild(leaves)
        return replace(
            self, args=args, kwargs=kwargs, leaves=leaves, rows=rows, residuals=NO_RESIDUALS
        )


def longest(calls: Sequence[Call]) -> Call:
    """Of calls that share a forward, one that the rows of the others are filled up to."""
    return max(calls, key=lambda call: call.length)


def enter(calls: Sequence[Call], padding: int = 0) -> None:
    """Tell the module what each row of the next forward wants.

    Args:
        calls: that the forward serves, in the order in which they are stacked.
        padding: further rows of the forward, which repeat the last one.
    """
    method = calls[0].method
    if method.enter is not None:
        rows = [(call.module_variant, call.rows) for call in calls]
        method.enter([*rows, (calls[-1].module_variant, padding)] if padding else rows)


def make_call(
    method: ParkableMethod,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sequence: int = 0,
    variant: Hashable = None,
    module_variant: Hashable = None,
) -> Call:
    """Describe a module call so that it can be compared and stacked with others."""
    kwargs = method.given(kwargs)
    if method.rules.text:
        args, kwargs = _fill_texts(method, args, kwargs)
    residuals = read_residuals(method.rules, kwargs) if method.rules.residuals else NO_RESIDUALS
    others = _without(kwargs, residuals, method.rules) if residuals else kwargs
    leaves, layout = method.flatten(args, others)
    read = _find_key(method, leaves, layout, variant)
    if residuals and not have_rows(residuals, read.rows, _dtype(leaves)):
        # Then they are arguments like others.
        residuals = NO_RESIDUALS
        leaves, layout = method.flatten(args, kwargs)
        read = _find_key(method, leaves, layout, variant)
    key, rows, tokens = read
    return Call(
        method, args, kwargs, leaves, key, rows, sequence, module_variant, residuals, tokens
    )


def _fill_texts(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallArguments:
    for padding in method.rules.text:
        args, kwargs = method.with_named(args, kwargs, padding.fill(method.named(args, kwargs)))
    return args, kwargs


def _without(
    kwargs: Mapping[str, Any], residuals: Residuals, rules: ArgumentRules
) -> dict[str, Any]:
    left_out = residuals.keys() | rules.residual_settings
    return {name: value for name, value in kwargs.items() if name not in left_out}


def _dtype(leaves: Sequence[Any]) -> torch.dtype | None:
    """Of what is denoised, which comes first."""
    return next((leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)), None)


def _find_key(
    method: ParkableMethod, leaves: Sequence[Any], layout: Layout, variant: Hashable
) -> ReadKey:
    """What is read off a call; steps of one size are read once, as they look the same."""
    outlined = outline(leaves, layout)
    if outlined is None:
        return _read(method, leaves, layout, variant)
    found = method.known_keys.get((outlined, variant))
    if found is None:
        found = _read(method, leaves, layout, variant)
        # What is SHARED is compared by its content, which is in no outline.
        if not any(kind is ArgumentKind.SHARED for kind, _ in found.key.arguments):
            # Looked up for every call: an LRU cache would take three times as long.
            if len(method.known_keys) >= MOST_KNOWN_KEYS:
                method.known_keys.clear()
            method.known_keys[outlined, variant] = found
    return found


def _read(
    method: ParkableMethod, leaves: Sequence[Any], layout: Layout, variant: Hashable
) -> ReadKey:
    return read_key(method.name, method.rules, method.names_in(layout), leaves, layout, variant)
