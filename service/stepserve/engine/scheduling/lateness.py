"""How far requests end beyond what was predicted: learned, so that deadlines can be promised."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque

from stepserve.engine.tracks.track import Prediction

PROMISED_SHARE = 0.985
REMEMBERED = 256
# Before enough was seen to know better, and at most: some mishaps may not refuse everybody.
FIRST_SHARE = 0.15
MOST_SHARE = 0.6


# Even what is as good as done can be late by the forward that runs at the moment, of which no
# forecast knows how far it is, and by one that goes ahead of its own.
FORWARDS_AHEAD = 2


class LatenessQuantile:
    """A high quantile of how late requests were, by what had been predicted of them last.

    Conformal: of n latenesses that were seen, the next one is at most the one of rank
    `PROMISED_SHARE * (n + 1)` with that probability, however they are distributed. Requests that
    were submitted later are no part of lateness, as the forecast is made anew with each of them.

    Written by the engine thread only; others may read slightly old values.
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.share = FIRST_SHARE

    def observe(self, predicted: Prediction, ended_s: float) -> None:
        """Learn from a request that ended, or expired, at `ended_s` on the engine's clock."""
        late_s = ended_s - predicted.at_s - predicted.seconds
        scale_s = _scale_s(predicted.seconds, predicted.forward_s)
        if len(self._latest) == REMEMBERED:
            self._sorted.remove(self._latest.popleft())
        late = late_s / scale_s if scale_s > 0 else 0.0
        self._latest.append(late)
        insort(self._sorted, late)
        self.share = self._quantile()

    def safe_s(self, seconds: float, forward_s: float) -> float:
        """Within how many seconds that can be promised which should take `seconds`."""
        return seconds + self.share * _scale_s(seconds, forward_s)

    def _quantile(self) -> float:
        rank = math.ceil(PROMISED_SHARE * (len(self._sorted) + 1))
        if rank > len(self._sorted):
            return min(max(FIRST_SHARE, self._sorted[-1]), MOST_SHARE)
        return min(max(self._sorted[rank - 1], 0.0), MOST_SHARE)


def _scale_s(seconds: float, forward_s: float) -> float:
    """What lateness is measured by: forecasts of the far future err by more seconds."""
    return seconds + FORWARDS_AHEAD * forward_s
