"""Tokenizers that split a text once.

A pipeline reads each prompt up to three times: for tokens it should replace, as it is, and once
more to see whether it was cut. Most requests have the same negative prompt, which is read as often.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers import BatchEncoding

MOST_TEXTS = 256
SIMPLE = (str, int, float, type(None))


def memoizing_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer, of the same class name, that remembers its latest answers.

    Whoever sets an attribute of it makes it forget, and so does a token that is added. Callers get
    copies. For one thread at a time.
    """
    known: OrderedDict[Hashable, Any] = OrderedDict()
    cls: Any = type(tokenizer)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        known.clear()
        cls.__setattr__(self, name, value)

    overrides = {name: _remembered(getattr(cls, name), known) for name in ("__call__", "tokenize")}
    made = copy.copy(tokenizer)
    made.__class__ = type(cls.__name__, (cls,), overrides | {"__setattr__": set_attribute})
    return made


def _remembered(method: Callable[..., Any], known: OrderedDict[Hashable, Any]) -> Any:
    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(map(_is_told_by_value, (*args, *kwargs.values()))):
            return method(self, *args, **kwargs)
        key = method.__name__, len(self), _typed((args, kwargs))
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        known.move_to_end(key)
        if len(known) > MOST_TEXTS:
            known.popitem(last=False)
        return _duplicate(known[key])

    return answer


def _is_told_by_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, SIMPLE)


def _typed(value: Any) -> Hashable:
    """Lists are not tuples, and True is not 1."""
    if isinstance(value, dict):
        return tuple((name, _typed(part)) for name, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_typed, value))
    return type(value), value


def _duplicate(answer: Any) -> Any:
    if not isinstance(answer, BatchEncoding):
        return copy.copy(answer)
    made = copy.copy(answer)
    made.data = {name: _duplicate_part(part) for name, part in answer.data.items()}
    return made


def _duplicate_part(part: Any) -> Any:
    return part.clone() if isinstance(part, torch.Tensor) else copy.deepcopy(part)
