"""Outputs of module calls that were made before: the same prompt need not be encoded twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from stepserve.engine.calls.arguments import content_digest, describe_plain, walk
from stepserve.engine.calls.stacking import UnsplittableError, duplicate, tensors_in


class OutputCache:
    """The latest outputs of one method by the content of its arguments; least used go first.

    It holds at most `max_bytes` of tensors. Callers get copies, so that a pipeline that writes into
    its prompt embeddings spoils nobody else's. For the engine's thread only.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._outputs: OrderedDict[Hashable, Any] = OrderedDict()

    def find(self, key: Hashable) -> tuple[bool, Any]:
        """Whether the output is known, and a copy of it."""
        if key not in self._outputs:
            return False, None
        self._outputs.move_to_end(key)
        return True, duplicate(self._outputs[key])

    def keep(self, key: Hashable, output: Any) -> None:
        """Remember a copy of an output, and forget the least recently used beyond the limit.

        An output that cannot be copied piece by piece is not remembered.
        """
        if key in self._outputs:
            return
        try:
            self._outputs[key] = duplicate(output)
        except UnsplittableError:
            return
        self.held_bytes += tensor_bytes(output)
        while self.held_bytes > self.max_bytes:
            _, forgotten = self._outputs.popitem(last=False)
            self.held_bytes -= tensor_bytes(forgotten)


def tensor_bytes(output: Any) -> int:
    """Size of all tensors in an output."""
    return sum(tensor.nbytes for tensor in tensors_in(output))


def content_key(variant: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Equal for calls whose arguments are equal in every bit."""
    return variant, *((path, _content(value)) for path, value in walk((args, kwargs)))


def _content(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.device, content_digest(value)
    if isinstance(value, dict | tuple | list):
        return type(value)
    return describe_plain(value)
