"""Which rows of different lengths share a forward. Pure.

A forward that takes rows of several lengths (sizes of an image, lengths of a prompt) fills them all
up to the longest. So one forward for all costs what so many of the longest rows cost, and saves
what is fixed in each forward that is not run. Lengths go together where that costs clearly less
than one forward for each. A length goes whole or not at all: else its rest would need a forward
all the same. Only neighbours by length go together: where one between is better left out, so is
what is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What is saved is no less than this share of the forward: costs are learned, and short rows end
# their step later in the company of long ones.
LEAST_SAVED = 0.01


@dataclass(frozen=True)
class LengthRows:
    """Rows of one length that wait for a forward.

    Args:
        length: more tokens make a row more expensive.
        rows: how many there are.
        row_limit: most rows of a forward whose longest rows are these.
        cost_s: seconds of such a forward by its rows.
    """

    length: int
    rows: int
    row_limit: int
    cost_s: Callable[[int], float]


def lengths_together(waiting: Sequence[LengthRows], length: int) -> frozenset[int]:
    """The lengths that had better share a forward with that one: it, and those that save most.

    Args:
        waiting: different lengths of rows that may share a forward.
        length: one of them.
    """
    line = sorted(waiting, key=lambda part: part.length)
    place = next(number for number, part in enumerate(line) if part.length == length)
    best_s, chosen = 0.0, line[place : place + 1]
    for first in range(place + 1):
        for last in range(place, len(line)):
            parts = line[first : last + 1]
            saved_s = _saved_s(parts)
            if saved_s > best_s:
                best_s, chosen = saved_s, parts
    return frozenset(part.length for part in chosen)


def companies(waiting: Sequence[LengthRows]) -> list[frozenset[int]]:
    """All lengths, each with those it shares forwards with: of the first, then of the first left.

    Args:
        waiting: different lengths of rows that may share a forward, in the order they go in.
    """
    found: list[frozenset[int]] = []
    left = list(waiting)
    while left:
        together = lengths_together(left, left[0].length)
        found.append(together)
        left = [part for part in left if part.length not in together]
    return found


def _saved_s(parts: Sequence[LengthRows]) -> float:
    """Seconds that one forward saves over one for each; 0 where it had better not be tried."""
    rows, longest = sum(part.rows for part in parts), parts[-1]
    if len(parts) == 1 or rows > longest.row_limit:
        return 0.0
    together_s = longest.cost_s(rows)
    saved_s = sum(part.cost_s(part.rows) for part in parts) - together_s
    return saved_s if saved_s >= LEAST_SAVED * together_s else 0.0
