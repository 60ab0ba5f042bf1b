"""Which parked calls share the next forward. Pure: costs and limits are arguments.

Calls with equal keys form a group. Each group is due at

    parked_s of its oldest call + expected seconds of its forward

and the group that is due first runs. So:

- A cheap call parked a little later goes ahead of an expensive one: a newcomer's text encoder runs
  before the denoiser step that all others wait for, and the newcomer joins that very step.
- Shapes share the device by time, not by turns: a step that costs six times as much comes once for
  every six of the cheap one, and neither blocks the other.
- Nothing starves. Let call x be parked at t, let C be the largest expected cost of a forward with
  its key, F the longest forward and A the number of tracks at work. x's group is due by t + C. A
  call parked later than that is due later still, so only calls parked by t + C can go before x:
  besides the forward that runs at that moment these are at most A - 1, one for each other track,
  and each goes once. Hence x starts no later than

      t + C + A * F

  however many cheap newcomers arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engine.call import Call, CallKey

CostOf = Callable[[CallKey, int], float]
LimitOf = Callable[[Call], int]


@dataclass(frozen=True)
class Parked:
    """A call that waits for a forward since `parked_s` on the engine's clock."""

    call: Call
    parked_s: float


def method_limit(call: Call) -> int:
    """The row limit that the method was given."""
    return call.method.max_rows


def pick(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The calls for the next forward, oldest first; empty if nothing is parked."""
    groups: dict[CallKey, list[Parked]] = {}
    for item in sorted(parked, key=lambda p: p.call.sequence):
        groups.setdefault(item.call.key, []).append(item)
    fitting = [fit_rows(group, limit_of(group[0].call)) for group in groups.values()]
    # `min` keeps the first of equals, which is the group with the oldest call.
    return min(fitting, key=lambda group: due_s(group, cost_of), default=[])


def fit_rows(group: Sequence[Parked], limit: int) -> list[Parked]:
    """The oldest calls whose rows fit into one forward; at least one, however large."""
    chosen: list[Parked] = []
    rows = 0
    for item in group:
        if chosen and rows + item.call.rows > limit:
            break
        chosen.append(item)
        rows += item.call.rows
    return chosen


def due_s(group: Sequence[Parked], cost_of: CostOf) -> float:
    """When a group is due on the engine's clock: the sooner, the older and cheaper it is."""
    rows = sum(item.call.rows for item in group)
    return group[0].parked_s + cost_of(group[0].call.key, rows)
