"""When requests in flight will be finished, if nothing more comes. Pure.

The shortest goes first (see `policy`), so a request ends when everything that goes ahead of it is
done, and itself. Requests of one kind share forwards: of its own kind all step along with it. What
goes ahead of it and is of other kinds is done whole. One whose steps are of several kinds stands in
line once for each, and ends with the last. Sizes whose rows share forwards are one kind, whose rows
are all as long as the longest (`mixing`). For each kind it is worked out between which of its
steps each request takes part, as queued ones are started when there are rows for them; then the
seconds follow in closed form:

    seconds(kind) = fixed_s * max(steps, row steps / row limit) + row_s * row steps
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepserve.engine.scheduling.demand import Demand

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ForwardCost:
    """Seconds of forwards of one kind by their rows: a straight line, and at least `least_s`.

    Args:
        row_limit: most rows of one forward.
    """

    fixed_s: float
    row_s: float
    row_limit: int
    least_s: float = 0.0

    def forward_s(self, rows: int) -> float:
        """Seconds of one forward for so many rows, or for as many as one may have."""
        return max(self.fixed_s + self.row_s * min(rows, self.row_limit), self.least_s)

    def steps_s(self, steps: Floats, row_steps: Floats) -> Floats:
        """Seconds of so many steps, in which so many rows in all take part."""
        forwards = np.maximum(steps, row_steps / max(self.row_limit, 1))
        return np.maximum(self.fixed_s * forwards + self.row_s * row_steps, self.least_s * forwards)


CostOfKind = Callable[[Hashable], ForwardCost]


class CompletionEstimate:
    """What becomes of the requests in flight and of a newcomer.

    Args:
        demands: of the requests in flight, and of the newcomer, which is the last.
        cost_of: what forwards of a kind cost.
        other_row_s: seconds that a request takes apart from its steps, for each of its rows.

    Attributes:
        finish_s: when each is done, in seconds from now, if the newcomer is let in.
        forward_s: the longest forward that they may have.
    """

    def __init__(
        self, demands: Sequence[Demand], cost_of: CostOfKind, other_row_s: float = 0.0
    ) -> None:
        self._demands, self._cost_of, self._other_row_s = demands, cost_of, other_row_s
        self.finish_s = finish_times_s(demands, cost_of, other_row_s)
        self.forward_s = _longest_forward_s(demands, cost_of)

    def without_s(self) -> Sequence[float]:
        """When each in flight is done if the newcomer is not let in."""
        return finish_times_s(self._demands[:-1], self._cost_of, self._other_row_s)

    def serial(self) -> CompletionEstimate:
        """What becomes of the newcomer if nothing is in flight."""
        return CompletionEstimate(self._demands[-1:], self._cost_of, self._other_row_s)

    def later_s(self, wait_s: float) -> float:
        """How long the newcomer takes if it comes in `wait_s` seconds, and nobody before it."""
        return max(self.finish_s[-1] - wait_s, self.serial().finish_s[-1])


def finish_times_s(
    demands: Sequence[Demand], cost_of: CostOfKind, other_row_s: float = 0.0
) -> tuple[float, ...]:
    """Seconds from now at which each request is done, in the order given."""
    owners = [number for number, demand in enumerate(demands) for _ in demand.parts]
    parts = [part for demand in demands for part in demand.parts]
    part_finish_s = _parts_finish_s(parts, cost_of, other_row_s)
    # Of the parts of one request the last is kept.
    last_s = dict(zip(owners, part_finish_s, strict=True))
    return tuple(last_s[number] for number in range(len(demands)))


def _parts_finish_s(
    demands: Sequence[Demand], cost_of: CostOfKind, other_row_s: float
) -> list[float]:
    """The same for requests with steps of one kind each; those of equal rank stay in order."""
    order = sorted(range(len(demands)), key=lambda number: demands[number].rank)
    line = [demands[number] for number in order]
    rows = np.array([demand.rows for demand in line], float)
    steps = np.array([demand.steps for demand in line], float)
    seconds = np.cumsum(other_row_s * rows)
    for kind in {demand.kind for demand in line}:
        cost = cost_of(kind)
        mine = np.array([demand.kind == kind for demand in line])
        ends = np.zeros(len(line))
        ends[mine] = _last_steps([demand for demand in line if demand.kind == kind], cost.row_limit)
        ahead = cost.steps_s(
            np.maximum.accumulate(ends), np.cumsum(np.where(mine, steps * rows, 0))
        )
        seconds[~mine] += ahead[~mine]
        seconds[mine] += cost.steps_s(ends[mine], _row_steps(ends[mine], steps[mine], rows[mine]))
    finish_s = np.empty(len(line))
    finish_s[order] = seconds
    told: list[float] = finish_s.tolist()
    return told


def _last_steps(demands: Sequence[Demand], row_limit: int) -> Floats:
    """The step of their kind at which each ends: queued ones are started as rows get free."""
    last = np.zeros(len(demands))
    ends: list[tuple[float, int]] = []
    taken, now = 0, 0.0
    for number in sorted(range(len(demands)), key=lambda number: _turn(demands[number])):
        demand = demands[number]
        while not demand.is_started and ends and taken + demand.rows > row_limit:
            now, rows = heapq.heappop(ends)
            taken -= rows
        last[number] = demand.steps + (0.0 if demand.is_started else now)
        heapq.heappush(ends, (last[number], demand.rows))
        taken += demand.rows
    return last


def _turn(demand: Demand) -> tuple[int, bool, float]:
    """Orders requests of a kind by when they have rows: the less urgent leave theirs to others."""
    return demand.priority, not demand.is_started, demand.due_s


def _row_steps(ends: Floats, steps: Floats, rows: Floats) -> Floats:
    """Rows that take part in the steps of a kind up to the end of each of its requests."""
    return (np.minimum.outer(ends, ends) - np.minimum.outer(ends, ends - steps)) @ rows


def _longest_forward_s(demands: Sequence[Demand], cost_of: CostOfKind) -> float:
    rows: dict[Hashable, int] = {}
    for demand in demands:
        for part in demand.parts:
            rows[part.kind] = rows.get(part.kind, 0) + part.rows
    seconds = (cost_of(kind).forward_s(wanted) for kind, wanted in rows.items())
    return max(seconds, default=0.0)
