"""How long a prompt is, as the text encoder counts."""

from __future__ import annotations

import copy
from typing import Any

from service.domain.errors import InvalidRequestError
from service.domain.requests import GenerationRequest


class PromptMeter:
    """Counts tokens on any thread.

    A tokenizer keeps how it pads and cuts as its own state, and the pipeline changes that on the
    engine thread at every call. Counting with the same one would now and then count a cut prompt,
    or leave a pipeline's prompt unpadded. Hence a copy, which is always used the same way.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.limit: int = tokenizer.model_max_length
        self._tokenizer = copy.deepcopy(tokenizer)
        # The first count settles the copy's state, while nobody else has it.
        self.count("")

    def count(self, text: str) -> int:
        """Tokens of a text, start and end marks included."""
        return len(self._tokenizer(text).input_ids)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what the text encoder would silently cut off.

        Raises:
            InvalidRequestError: `prompt` or `negative_prompt` has too many tokens.
        """
        for field in ("prompt", "negative_prompt"):
            tokens = self.count(getattr(request, field))
            if tokens > self.limit:
                raise InvalidRequestError(
                    f"{field} is {tokens} tokens long and the limit of model {request.model} is "
                    f"{self.limit}, start and end marks included",
                    field=field,
                )
