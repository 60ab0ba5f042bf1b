"""Text inputs filled up to one of a few lengths, so that prompts of any length share forwards.

What is filled in are zeros that a mask keeps out of attention: their weights are exactly zero, so
a row gets what it would get without them. Two rules keep its bits free of what it shares a forward
with: the length follows from the call alone, and the mask is always given, also where nothing is
filled in, as attention with a mask takes another kernel than attention without.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LENGTHS = (128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584)
"""Few, so that prompts meet, and close enough that filling costs little beside the image.

Longer texts stay as they are: models have tables of 4096 positions for text and image together.
"""


@dataclass(frozen=True)
class TextPadding:
    """Arguments of a method that hold text, and the mask that goes with them.

    Args:
        text: names of tensors of shape (rows, tokens, ...).
        mask: name of the argument of shape (rows, tokens) that is true, or not 0, where a token
            counts; without it all do.
    """

    text: tuple[str, ...]
    mask: str

    def fill(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those arguments that are others where the text is filled up.

        None are where there is no text, or its mask is not of the form above.
        """
        texts = {name: arguments[name] for name in self.text if arguments.get(name) is not None}
        mask = arguments.get(self.mask)
        shapes = {_rows_and_tokens(text) for text in texts.values()}
        shape = shapes.pop() if len(shapes) == 1 else None
        if shape is None or (mask is not None and getattr(mask, "shape", None) != shape):
            return {}
        length = padded_length(shape[1])
        filled = {name: _fill(text, length) for name, text in texts.items()}
        return {**filled, self.mask: _mask(next(iter(texts.values())), mask, length)}


def padded_length(tokens: int) -> int:
    """The length that a text of so many tokens is filled up to."""
    place = bisect_left(LENGTHS, tokens)
    return LENGTHS[place] if place < len(LENGTHS) else tokens


def _rows_and_tokens(text: Any) -> torch.Size | None:
    return text.shape[:2] if isinstance(text, Tensor) and text.dim() > 1 else None


def _fill(text: Tensor, length: int) -> Tensor:
    after = (0, 0) * (text.dim() - 2)
    return functional.pad(text, (*after, 0, length - text.shape[1]))


def _mask(text: Tensor, mask: Tensor | None, length: int) -> Tensor:
    filled = text.new_zeros((text.shape[0], length), dtype=torch.bool)
    filled[:, : text.shape[1]] = True if mask is None else mask
    return filled
