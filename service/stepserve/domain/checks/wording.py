"""How messages show what was given, and what was likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN_CHARACTERS = 80
SHORTEST_PART = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` where one of `known` is close to `word`, else nothing."""
    close = closest(word, known)
    return f"; did you mean {close!r}?" if close else ""


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the one of `known` that is like `word`, or None; capitals make no difference.

    Args:
        likeness: the least that counts, from 0 to 1, of a word that is no part of another.
    """
    names = {name.lower(): name for name in known}
    word = word[:SHOWN_CHARACTERS].lower()
    # A part of a name is close, too: "ddim"; a whole word of it is closer than likeness: "steps".
    holding = [name for name in names if len(word) >= SHORTEST_PART and word in name]
    worded = [name for name in holding if word in name.split("_")]
    same = [name for name in names if name == word]
    close = (
        same or worded or get_close_matches(word, names, 1, likeness) or sorted(holding, key=len)
    )
    return names[close[0]] if close else None


def shown(text: str) -> str:
    """Return `text` quoted and printable, cut to a length that fits in an error message."""
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return ascii(cut)


def digits(value: int) -> str:
    """Return the number, or its rough size where writing it out would flood the message."""
    return str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
