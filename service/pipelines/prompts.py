"""How long a prompt is, as the text encoders count."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from service.domain.errors import InvalidRequestError
from service.domain.requests import GenerationRequest

# A tokenizer that was saved without a limit has one of 30 digits.
UNLIMITED = 10**6


class TokenCounter:
    """Counts tokens on any thread.

    A tokenizer keeps how it pads and cuts as its own state, and the pipeline changes that on the
    engine thread at every call. Counting with the same one would now and then count a cut prompt,
    or leave a pipeline's prompt unpadded. Hence a copy, which is always used the same way.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.limit = limit
        self._tokenizer = copy.deepcopy(tokenizer)
        # The first count settles the copy's state, while nobody else has it.
        self.count("")

    def count(self, text: str) -> int:
        """Tokens of a text, start and end marks included."""
        return len(self._tokenizer(text).input_ids)


class PromptMeter:
    """Refuses prompts that a text encoder would silently cut off.

    Where a pipeline has several tokenizers the strictest decides: what any of its encoders does
    not see is missing from the picture. Without a tokenizer, every prompt passes.

    Args:
        counters: one for each tokenizer that has a limit.
    """

    def __init__(self, counters: Sequence[TokenCounter] = ()) -> None:
        self._counters = tuple(counters)

    @property
    def limit(self) -> int | None:
        """Most tokens that every encoder reads, or None where none has a limit."""
        return min((counter.limit for counter in self._counters), default=None)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what a text encoder would silently cut off.

        Raises:
            InvalidRequestError: `prompt` or `negative_prompt` has too many tokens.
        """
        for field in ("prompt", "negative_prompt"):
            for counter in self._counters:
                _check_field(request, field, counter)


def measure_prompts(
    tokenizers: Iterable[Any], max_sequence_length: int | None = None, limit: int | None = None
) -> PromptMeter:
    """A meter for the tokenizers of a pipeline; those that are missing or limitless do not count.

    Args:
        tokenizers: tokenizers, processors that hold one, or None.
        max_sequence_length: where the pipeline cuts what its tokenizers would let through.
        limit: said by the operator, who accepts that some encoder reads less than this.
    """
    counters = []
    for tokenizer in tokenizers:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        own = _own_limit(tokenizer, max_sequence_length)
        if tokenizer is not None and (limit or own):
            counters.append(TokenCounter(tokenizer, limit or own))
    return PromptMeter(counters)


def tokenizers_of(pipeline: Any) -> list[Any]:
    """`tokenizer`, `tokenizer_2` and so on, in that order."""
    names = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    return [pipeline.components[name] for name in names]


def _own_limit(tokenizer: Any, max_sequence_length: int | None) -> int:
    limits = (getattr(tokenizer, "model_max_length", None), max_sequence_length)
    return min((int(n) for n in limits if n is not None and n < UNLIMITED), default=0)


def _check_field(request: GenerationRequest, field: str, counter: TokenCounter) -> None:
    tokens = counter.count(getattr(request, field))
    if tokens > counter.limit:
        raise InvalidRequestError(
            f"{field} is {tokens} tokens long and the limit of model {request.model} is "
            f"{counter.limit}, start and end marks included",
            field=field,
        )
