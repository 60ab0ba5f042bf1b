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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

LENGTHS = (128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584)
"""Few, so that prompts meet, and close enough that filling costs little beside the image.

Longer texts stay as they are: models have tables of 4096 positions for text and image together.
"""


class TextMask(Protocol):
    """How a method is told which tokens count.

    Between its two methods a mask is boolean and of shape (rows, tokens), and true counts.
    """

    def read(self, arguments: Mapping[str, Any], text: Tensor) -> Tensor | None:
        """The mask among the arguments of a call, all true where there is none.

        None if what is there is of another form.
        """
        ...

    def write(self, arguments: Mapping[str, Any], mask: Tensor, text: Tensor) -> dict[str, Any]:
        """The arguments that hold the mask as the method takes it, for the text before filling."""
        ...


@dataclass(frozen=True)
class TokenMask:
    """An argument of shape (rows, tokens) that is true, or not 0, where a token counts."""

    name: str

    def read(self, arguments: Mapping[str, Any], text: Tensor) -> Tensor | None:
        """As `TextMask` has it."""
        given = arguments.get(self.name)
        if given is None:
            return text.new_ones(text.shape[:2], dtype=torch.bool)
        return given.bool() if _has_shape(given, text.shape[:2]) else None

    def write(self, arguments: Mapping[str, Any], mask: Tensor, text: Tensor) -> dict[str, Any]:
        """As `TextMask` has it."""
        return {self.name: mask}


@dataclass(frozen=True)
class JointMask:
    """A boolean entry of a dict, of shape (rows, 1, 1, tokens and then places of the image).

    Args:
        name: of the argument that is the dict.
        entry: its key.
        image: argument of shape (rows, places, ...).
    """

    name: str
    entry: str
    image: str

    def read(self, arguments: Mapping[str, Any], text: Tensor) -> Tensor | None:
        """As `TextMask` has it."""
        rows, tokens = text.shape[:2]
        joint = self._joint(arguments, text)
        places = tokens + arguments[self.image].shape[1]
        return joint[:, 0, 0, :tokens].bool() if _has_shape(joint, (rows, 1, 1, places)) else None

    def write(self, arguments: Mapping[str, Any], mask: Tensor, text: Tensor) -> dict[str, Any]:
        """As `TextMask` has it."""
        of_image = self._joint(arguments, text)[..., text.shape[1] :].bool()
        joint = torch.cat([mask[:, None, None], of_image], dim=-1)
        return {self.name: {**(arguments.get(self.name) or {}), self.entry: joint}}

    def _joint(self, arguments: Mapping[str, Any], text: Tensor) -> Any:
        given = (arguments.get(self.name) or {}).get(self.entry)
        if given is not None:
            return given
        rows, tokens = text.shape[:2]
        places = tokens + arguments[self.image].shape[1]
        return text.new_ones((rows, 1, 1, places), dtype=torch.bool)


@dataclass(frozen=True)
class FrameBias:
    """An argument of shape (rows times frames, 1, tokens): what is added to scores of attention.

    Args:
        name: of the argument.
        video: argument of shape (rows, channels, frames, ...).
    """

    name: str
    video: str

    def read(self, arguments: Mapping[str, Any], text: Tensor) -> Tensor | None:
        """As `TextMask` has it."""
        is_given = arguments.get(self.name) is not None
        return None if is_given else text.new_ones(text.shape[:2], dtype=torch.bool)

    def write(self, arguments: Mapping[str, Any], mask: Tensor, text: Tensor) -> dict[str, Any]:
        """As `TextMask` has it."""
        bias = text.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        frames = arguments[self.video].shape[2]
        return {self.name: bias[:, None].repeat_interleave(frames, dim=0)}


@dataclass(frozen=True)
class TextPadding:
    """Arguments of a method that hold text, and the mask that goes with them.

    Args:
        mask: how the method is told which tokens count.
        text: names of tensors, or lists of them, of shape (rows, tokens, ...).
        places: names of tensors of shape (tokens, ...), the same for all rows.
    """

    mask: TextMask
    text: tuple[str, ...] = ("encoder_hidden_states",)
    places: tuple[str, ...] = ()

    def fill(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that are others where its text is filled up.

        None are where there is no text, or it or its mask is not of the form above.
        """
        texts = {name: arguments[name] for name in self.text if arguments.get(name) is not None}
        places = {name: arguments[name] for name in self.places if arguments.get(name) is not None}
        tensors = [tensor for text in texts.values() for tensor in _listed(text)]
        if not tensors or not _agree(tensors, [*places.values()]):
            return {}
        mask = self.mask.read(arguments, tensors[0])
        if mask is None:
            return {}
        tokens = tensors[0].shape[1]
        more = padded_length(tokens) - tokens
        filled = {name: _fill(1, more, text) for name, text in texts.items()}
        filled |= {name: _fill(0, more, place) for name, place in places.items()}
        return filled | self.mask.write(arguments, _fill(1, more, mask), tensors[0])


def padded_length(tokens: int) -> int:
    """The length that a text of so many tokens is filled up to."""
    place = bisect_left(LENGTHS, tokens)
    return LENGTHS[place] if place < len(LENGTHS) else tokens


def _listed(text: Any) -> list[Any]:
    return text if isinstance(text, list) else [text]


def _agree(texts: list[Any], places: list[Any]) -> bool:
    """Whether all are tensors for as many tokens, and the texts for as many rows."""
    if not all(isinstance(value, Tensor) and value.dim() > 1 for value in [*texts, *places]):
        return False
    rows, tokens = texts[0].shape[:2]
    return all(text.shape[:2] == (rows, tokens) for text in texts) and all(
        place.shape[0] == tokens for place in places
    )


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _fill(dimension: int, more: int, value: Any) -> Any:
    """A tensor, or a list of them, with zeros behind the values along that dimension."""
    if isinstance(value, list):
        return [_fill(dimension, more, one) for one in value]
    after = (0, 0) * (value.dim() - 1 - dimension)
    return functional.pad(value, (*after, 0, more))
