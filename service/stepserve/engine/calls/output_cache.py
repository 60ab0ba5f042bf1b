"""Outputs of module calls that were made before: the same prompt need not be encoded twice."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import torch
from cachetools import LRUCache

from stepserve.engine.calls.arguments import content_digest, describe_plain, flatten
from stepserve.engine.calls.objects import UnsplittableError
from stepserve.engine.calls.stacking import duplicate, tensors_in


class OutputCache:
    """The latest outputs of one method by the content of its arguments; least used go first.

    It holds at most `max_bytes` of tensors. Callers get copies, so that a pipeline that writes into
    its prompt embeddings spoils nobody else's. For the engine's thread only.
    """

    def __init__(self, max_bytes: int) -> None:
        self._outputs: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=tensor_bytes)

    @property
    def held_bytes(self) -> int:
        """Size of all tensors that it holds."""
        return int(self._outputs.currsize)

    def find(self, key: Hashable) -> tuple[bool, Any]:
        """Whether the output is known, and a copy of it."""
        try:
            return True, duplicate(self._outputs[key])
        except KeyError:
            return False, None

    def keep(self, key: Hashable, output: Any) -> None:
        """Remember a copy of an output that can be copied piece by piece, and is not too large."""
        with suppress(UnsplittableError, ValueError):
            self._outputs[key] = duplicate(output)


def tensor_bytes(output: Any) -> int:
    """Size of all tensors in an output."""
    return sum(tensor.nbytes for tensor in tensors_in(output))


def content_key(variant: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Equal for calls whose arguments are equal in every bit."""
    leaves, structure = flatten((args, kwargs))
    return variant, structure, *map(_content, leaves)


def _content(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.device, content_digest(value)
    return describe_plain(value)
