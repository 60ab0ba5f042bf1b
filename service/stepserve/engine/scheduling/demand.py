"""What a request asks of the engine, as all that decides and predicts sees it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

from stepserve.domain.requests import Priority

# By plain numbers: they are looked up at every tick, and an enumeration's members are slow at that.
PATIENCE: dict[int, float] = {
    int(Priority.INTERACTIVE): 0.125,
    int(Priority.NORMAL): 1.0,
    int(Priority.BATCH): 8.0,
}
# Of any request: nothing is learned of it yet.
SHORTEST_S = 1e-3


# A tuple, as one is made for each request at each tick and at each submission.
class Demand(NamedTuple):
    """What is left to do for one request.

    Args:
        arrival: orders requests by their submission.
        rows: the most that any denoiser call of it will still take.
        steps: denoiser calls left of its kind, without those that should be skipped.
        kind: requests of equal kind can share forwards: one size, and one set of adapters.
        priority: 0 goes first.
        submitted_s: on the engine's clock.
        left_s: what all steps left would take if there were no other request.
        serial_s: what all its steps would take so.
        latest_start_s: when it must go on for its deadline to be met; infinite if it has none.
        is_started: whether it has the rows that it takes; else it is queued.
        later: the same of other kinds that it will go on with after these, and their kinds.
    """

    arrival: int = 0
    rows: int = 1
    steps: int = 0
    kind: Hashable = None
    priority: int = Priority.NORMAL
    submitted_s: float = 0.0
    left_s: float = 0.0
    serial_s: float = 0.0
    latest_start_s: float = math.inf
    is_started: bool = False
    later: tuple[tuple[int, Hashable], ...] = ()

    @property
    def parts(self) -> tuple[Demand, ...]:
        """Its calls of each kind by themselves, in their order."""
        if not self.later:
            return (self,)
        now = self._replace(later=())
        return (now, *(now._replace(steps=steps, kind=kind) for steps, kind in self.later))

    @property
    def weight(self) -> float:
        """What a second of waiting counts for it."""
        return 1 / (patience(self.priority) * max(self.serial_s, SHORTEST_S))

    @property
    def rank(self) -> float:
        """Seconds left over the weight: the least goes first."""
        return self.left_s * patience(self.priority) * max(self.serial_s, SHORTEST_S)

    @property
    def due_s(self) -> float:
        """When it is due to be started, if it is queued."""
        return due_s(self.submitted_s, self.left_s, self.priority, self.latest_start_s)


def due_s(since_s: float, seconds: float, priority: int, latest_start_s: float = math.inf) -> float:
    """When something is due on the engine's clock: the sooner, the older, cheaper and urgent."""
    return min(since_s + patience(priority) * seconds, max(latest_start_s, since_s))


def patience(priority: int) -> float:
    """How many times its expected seconds something waits before it goes ahead of newcomers."""
    known = PATIENCE.get(priority)
    return PATIENCE[min(max(priority, 0), max(PATIENCE))] if known is None else known
