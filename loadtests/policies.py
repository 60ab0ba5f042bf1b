"""Policies to compare the engine's own with: what other servers do, and the default before.

Both are `stepserve.engine.scheduling.policy.Policy`, so that simulations and tests can run them.

DUE_TIME shares the device by time. What waits is due at

    since_s + patience * expected seconds

If a request has a deadline, and its latest start by which that can be met comes sooner, it is due
then, though never before `since_s`. What is due first goes first: among calls, `since_s` is when
the call was parked and the seconds are those of the forward that it can share. Calls with equal
keys form a group, which is due with its most urgent call. The group that is due first runs, its
most urgent calls first while their rows fit. So a step that costs six times as much comes once for
every six of the cheap one, and between priorities the shares of time are as 8 to 1. The engine's
bound holds with H = 1.

STRICT_FIFO is what other servers do: calls run for the oldest request alone and for those right
behind it that happen to want the same; the first request that wants something else blocks all
behind it. Priorities and deadlines are not heeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from types import MappingProxyType

from stepserve.engine.scheduling.demand import Demand, due_s
from stepserve.engine.scheduling.policy import (
    DENOISE,
    SHORTEST_FIRST,
    CostOf,
    LimitOf,
    Parked,
    Policy,
    as_urgent,
    fit_rows,
    forward_s,
    groups,
    method_limit,
)


def pick(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The calls for the next forward, most urgent first; empty if nothing is parked."""
    # A group is due with its most urgent call. `min` keeps the first of equals, which is the group
    # with the oldest call.
    lines = [by_urgency(g, cost_of, limit_of) for g in groups(parked)]
    _, line = min(lines, key=itemgetter(0), default=(0.0, []))
    return fit_rows(line, limit_of) if line else []


def by_urgency(
    group: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf
) -> tuple[float, list[Parked]]:
    """When calls with equal keys are due, and they themselves, the most urgent first.

    Args:
        group: oldest first, which is kept among those that are equally urgent.
    """
    seconds = forward_s(group, cost_of, limit_of)
    line = sorted(((_call_due_s(p, seconds), p) for p in group), key=itemgetter(0))
    return line[0][0], [item for _, item in line]


def strict_fifo(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The oldest request's call, with those right behind that have the same key.

    Calls that are no denoising step go first, one by one: they belong to the start and the end of
    a request, and would else keep newcomers from ever joining.
    """
    others = [item for item in parked if item.call.method.stage != DENOISE]
    if others:
        return [min(others, key=lambda item: item.call.sequence)]
    line = sorted(parked, key=lambda item: item.demand.arrival)
    same = next((i for i, p in enumerate(line) if p.call.key != line[0].call.key), len(line))
    return fit_rows(line[:same], limit_of) if line else []


def all_running(queued: Demand, running: Sequence[Demand]) -> Sequence[Demand]:
    """All running requests."""
    return running


def _call_due_s(item: Parked, seconds: float) -> float:
    return due_s(item.parked_s, seconds, item.demand.priority, item.demand.latest_start_s)


DUE_TIME = Policy(pick, SHORTEST_FIRST.rank, as_urgent)
STRICT_FIFO = Policy(strict_fifo, lambda queued: queued.arrival, all_running, kinds_in_flight=1)
POLICIES = MappingProxyType(
    {"shortest-first": SHORTEST_FIRST, "due-time": DUE_TIME, "strict-fifo": STRICT_FIFO}
)
