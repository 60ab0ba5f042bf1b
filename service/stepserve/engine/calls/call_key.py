"""What is read off the arguments of a call: which calls may share its forward, and what it costs.

The row count of a call is the leading size of its first tensor that has dimensions, in the order of
the method's parameters. `ArgumentKind` lists how each value in the arguments is then treated, and
`ArgumentRules` what has to be said by name because the arguments themselves do not tell.

Python numbers are PLAIN, because they may as well be settings: calls share a forward only if they
agree. How long rows are stays out of the key where a forward takes rows of several lengths: see
`ArgumentRules.row_tokens`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec

from stepserve.engine.calls.arguments import (
    ArgumentKind,
    ArgumentRules,
    classify,
    count_tokens,
    describe,
    describe_forms,
    unflatten,
)

Argument = tuple[ArgumentKind, Hashable]
RowTokens = frozenset[tuple[int, ...]]
CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


class Layout(NamedTuple):
    """How values stand in the arguments of a call: by position, then by these names."""

    names: tuple[str, ...]
    structure: PyTreeSpec

    def rebuild(self, leaves: Sequence[Any]) -> CallArguments:
        """Positional and keyword arguments of these values."""
        args, values = unflatten(self.structure, leaves)
        return args, dict(zip(self.names, values, strict=True))


@dataclass(frozen=True)
class CallKey:
    """Calls with equal keys may share a forward, where their residuals agree.

    Row counts, prompts and seeds stay out of it.

    Args:
        method: its name.
        layout: of the arguments.
        arguments: of each value in it, how it is stacked, and what must agree.
        variant: of the module.
        tokens: as in `ReadKey`, where the method takes rows of several lengths, but such may share
            no forward.
    """

    method: str
    layout: Layout
    arguments: tuple[Argument, ...]
    variant: Hashable = None
    tokens: RowTokens = frozenset()

    # Looked up at every tick for every parked call.
    @cached_property
    def _hash(self) -> int:
        return hash((self.method, self.layout, self.arguments, self.variant, self.tokens))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def form(self) -> tuple[Hashable, ...]:
        """What decides the cost of a row: the method, and dtype and shape of what is batched.

        Where nothing is, the rows are a list, of which there may be one for prompts as well.
        """
        batched = [text for kind, text in self.arguments if kind is ArgumentKind.BATCHED]
        listed = [text for kind, text in self.arguments if kind is ArgumentKind.ROW_LIST]
        return (self.method, *(batched or listed[:1]))


class CallShape(NamedTuple):
    """What decides the cost of a row of a forward.

    Args:
        form: of the calls' key.
        length: tokens of the longest row, where rows of several lengths may share a forward; all
            are filled up to it. 0 where the form says all.
    """

    form: tuple[Hashable, ...]
    length: int = 0


class ReadKey(NamedTuple):
    """What is read off the arguments of a call.

    Args:
        key: of the call.
        rows: how many it has.
        tokens: how many tokens the lists of a row make, for each kind of row, where the method
            takes rows of several lengths.
    """

    key: CallKey
    rows: int
    tokens: RowTokens = frozenset()


def read_key(
    method: str,
    rules: ArgumentRules,
    names: Sequence[str],
    leaves: Sequence[Any],
    layout: Layout,
    variant: Hashable = None,
) -> ReadKey:
    """Read the values in the arguments of a call.

    Args:
        method: its name.
        rules: of the method.
        names: of the argument that each value belongs to.
        leaves: the values.
        layout: how they stand.
        variant: of the module.
    """
    ruled = [rules.kind_of(name) for name in names]
    rows = next(filter(None, map(_leading_size, leaves, ruled)), 1)
    kinds = [classify(leaf, rows, rule) for leaf, rule in zip(leaves, ruled, strict=True)]
    arguments = tuple(
        (kind, _describe(rules, kind, leaf, rows)) for kind, leaf in zip(kinds, leaves, strict=True)
    )
    tokens = _tokens_of_rows(rules, dict(zip(names, leaves, strict=True)))
    kept_apart = frozenset[tuple[int, ...]]() if rules.mixes_lengths else tokens
    return ReadKey(CallKey(method, layout, arguments, variant, kept_apart), rows, tokens)


def _describe(rules: ArgumentRules, kind: ArgumentKind, leaf: Any, rows: int) -> Hashable:
    has_any_shape = kind is ArgumentKind.ROW_LIST and rules.row_tokens
    return describe_forms(leaf) if has_any_shape else describe(kind, leaf, rows)


def _tokens_of_rows(rules: ArgumentRules, arguments: Mapping[str, Any]) -> RowTokens:
    """How many tokens each list makes of its entry for a row; empty without a rule."""
    lists = {
        name: arguments[name] for name in rules.row_tokens if isinstance(arguments.get(name), list)
    }
    counters = [rules.row_tokens[name] for name in lists]
    # Lists of which one is longer are the method's to refuse.
    entries = zip(*lists.values(), strict=False)
    return frozenset(tuple(map(count_tokens, row, counters)) for row in entries)


def _leading_size(value: Any, ruled: ArgumentKind | None) -> int | None:
    """The row count that a value tells, at least 1; None where it tells none."""
    if ruled is ArgumentKind.ROW_LIST and isinstance(value, list):
        return max(len(value), 1)
    has_rows = ruled is None and isinstance(value, torch.Tensor) and value.dim() > 0
    return max(value.shape[0], 1) if has_rows else None
