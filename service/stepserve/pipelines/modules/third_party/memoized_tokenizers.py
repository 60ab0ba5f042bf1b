"""Tokenizers that split a text once.

A pipeline reads each prompt up to three times: for tokens it should replace, as it is, and once
more to see whether it was cut. Most requests have the same negative prompt, which is read as often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

from cachetools import LRUCache
from transformers import BatchEncoding

from stepserve.engine.calls.arguments import SIMPLE, flatten

MOST_TEXTS = 256


def memoizing_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer, of the same class name, that remembers its latest answers.

    Whoever sets an attribute of it makes it forget, and so does a token that is added. Callers get
    copies. For one thread at a time.
    """
    known: LRUCache[Hashable, Any] = LRUCache(MOST_TEXTS)
    cls: Any = type(tokenizer)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        known.clear()
        cls.__setattr__(self, name, value)

    overrides = {name: _remembered(getattr(cls, name), known) for name in ("__call__", "tokenize")}
    made = copy.copy(tokenizer)
    made.__class__ = type(cls.__name__, (cls,), overrides | {"__setattr__": set_attribute})
    return made


def _remembered(method: Callable[..., Any], known: LRUCache[Hashable, Any]) -> Any:
    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = flatten((args, kwargs))
        if not all(type(leaf) in SIMPLE for leaf in leaves):
            return method(self, *args, **kwargs)
        # True is not 1.
        typed = tuple((type(leaf), leaf) for leaf in leaves)
        key = method.__name__, len(self), structure, typed
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        return _duplicate(known[key])

    return answer


def _duplicate(answer: Any) -> Any:
    if not isinstance(answer, BatchEncoding):
        return copy.copy(answer)
    made = copy.copy(answer)
    made.data = copy.deepcopy(answer.data)
    return made
