"""How long a prompt is, as the text encoders count."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import CutPrompt
from stepserve.domain.requests import GenerationRequest

# A tokenizer that was saved without a limit has one of 30 digits.
UNLIMITED = 10**6
# What some pipelines neither take as an argument nor have from their tokenizer: by their class.
LIMITS_IN_CODE = (
    (r"HunyuanDiT.*Pipeline", "text_encoder", 77),
    (r"HunyuanDiT.*Pipeline", "text_encoder_2", 256),
    (r"IF.*Pipeline", "text_encoder", 77),
    (r"Kandinsky3.*Pipeline", "text_encoder", 128),
    (r"Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline", "text_encoder", 77),
)
FIELDS = ("prompt", "negative_prompt")


class TokenCounter:
    """Counts tokens on any thread.

    A tokenizer keeps how it pads and cuts as its own state, and the pipeline changes that on the
    engine thread at every call. Counting with the same one would now and then count a cut prompt,
    or leave a pipeline's prompt unpadded. Hence a copy, which is always used the same way.

    Args:
        tokenizer: of the pipeline.
        limit: most tokens that its text encoder reads.
        encoder: what the pipeline calls that text encoder.
    """

    def __init__(self, tokenizer: Any, limit: int, encoder: str = "text_encoder") -> None:
        self.limit = limit
        self.encoder = encoder
        self._tokenizer = copy.deepcopy(tokenizer)
        # The first count settles the copy's state, while nobody else has it.
        self.count("")

    def count(self, text: str) -> int:
        """Tokens of a text, start and end marks included."""
        return len(self._tokenizer(text).input_ids)


class PromptMeter:
    """Refuses prompts that no text encoder reads to their end, and says which of them cut one.

    Pipelines with several encoders give the short ones (CLIP's, of 77 tokens) what fits, and the
    whole prompt to a long one (T5's). Without a tokenizer, every prompt passes.

    Args:
        counters: one for each tokenizer that has a limit.
        limit: said by the operator, instead of what the encoders read.
    """

    def __init__(self, counters: Sequence[TokenCounter] = (), limit: int | None = None) -> None:
        self._counters = tuple(counters)
        self._said = limit

    @property
    def limit(self) -> int | None:
        """Most tokens that some encoder reads, or None where none has a limit."""
        if not self._counters:
            return None
        return self._said or max(counter.limit for counter in self._counters)

    def check(self, request: GenerationRequest) -> tuple[CutPrompt, ...]:
        """Refuse what no text encoder reads whole; returns what some of them cut off.

        Raises:
            InvalidRequestError: `prompt` or `negative_prompt` has too many tokens.
        """
        return tuple(cut for field in FIELDS for cut in self._check_field(request, field))

    def _check_field(self, request: GenerationRequest, field: str) -> list[CutPrompt]:
        text = getattr(request, field)
        counted = [(counter.limit, counter.count(text), counter) for counter in self._counters]
        cut = [CutPrompt(field, c.encoder, n, limit) for limit, n, c in counted if n > limit]
        if self._said is not None:
            _refuse(request, field, max((n for _, n, _ in counted), default=0), self._said)
        elif cut and len(cut) == len(counted):
            longest = max(cut, key=lambda one: one.limit)
            _refuse(request, field, longest.tokens, longest.limit)
        return cut


def _refuse(request: GenerationRequest, field: str, tokens: int, limit: int) -> None:
    if tokens > limit:
        raise InvalidRequestError(
            f"{field} is {tokens} tokens long and the limit of model {request.model} is {limit}, "
            "start and end marks included",
            field=field,
        )


def measure_prompts(
    pipeline: Any, max_sequence_length: int | None = None, limit: int | None = None
) -> PromptMeter:
    """A meter for the tokenizers of a pipeline; those that are missing or limitless do not count.

    Args:
        pipeline: whose tokenizers, or processors that hold one, are asked.
        max_sequence_length: where it cuts what its tokenizers would let through.
        limit: said by the operator, who accepts that some encoder reads less than this.
    """
    counters = []
    tokenizers = tokenizers_of(pipeline)
    for encoder, tokenizer in tokenizers.items():
        limits = (
            getattr(tokenizer, "model_max_length", None),
            max_sequence_length,
            _limit_in_code(type(pipeline).__name__, encoder),
            # Where there are several, it is one of theirs.
            getattr(pipeline, "tokenizer_max_length", None) if len(tokenizers) == 1 else None,
        )
        own = min((int(n) for n in limits if n is not None and n < UNLIMITED), default=None)
        if own or limit:
            counters.append(TokenCounter(tokenizer, own or limit or UNLIMITED, encoder))
    return PromptMeter(counters, limit)


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """`tokenizer`, `tokenizer_2` and so on, in that order, by the names of their text encoders."""
    names = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    found = {n.replace("tokenizer", "text_encoder", 1): pipeline.components[n] for n in names}
    # A processor holds one.
    inner = {name: getattr(value, "tokenizer", value) for name, value in found.items()}
    return {name: tokenizer for name, tokenizer in inner.items() if tokenizer is not None}


def _limit_in_code(pipeline: str, encoder: str) -> int | None:
    own = (row for row in LIMITS_IN_CODE if row[1] == encoder and re.fullmatch(row[0], pipeline))
    return next((limit for _, _, limit in own), None)
