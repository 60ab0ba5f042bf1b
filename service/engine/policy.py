"""Which parked calls share the next forward. Pure: the clock and the costs are arguments.

Calls with equal keys form a group. The group with the highest response ratio runs,

    (waited_s + cost_s) / cost_s

where `waited_s` is the age of its oldest call (highest response ratio next, Brinch Hansen 1971).
Cheap calls, such as a newcomer's text encoder, go ahead of an expensive denoiser step, so that a
newcomer joins the very next step. Nothing starves: the ratio of a group that waits grows without
bound, and shapes take turns by expected cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engine.call import Call, CallKey

CostOf = Callable[[CallKey, int], float]


@dataclass(frozen=True)
class Parked:
    """A call that waits for a forward since `parked_s` on the engine's clock."""

    call: Call
    parked_s: float


def pick(parked: Sequence[Parked], now_s: float, cost_of: CostOf) -> list[Parked]:
    """The calls for the next forward, oldest first; empty if nothing is parked."""
    groups: dict[CallKey, list[Parked]] = {}
    for item in sorted(parked, key=lambda p: p.call.sequence):
        groups.setdefault(item.call.key, []).append(item)
    fitting = [fit_rows(group) for group in groups.values()]
    return max(fitting, key=lambda g: response_ratio(g, now_s, cost_of), default=[])


def fit_rows(group: Sequence[Parked]) -> list[Parked]:
    """The oldest calls whose rows fit into one forward; at least one, however large."""
    limit = group[0].call.method.max_rows
    chosen: list[Parked] = []
    rows = 0
    for item in group:
        if chosen and rows + item.call.rows > limit:
            break
        chosen.append(item)
        rows += item.call.rows
    return chosen


def response_ratio(group: Sequence[Parked], now_s: float, cost_of: CostOf) -> float:
    """Urgency of a group: 1 when its oldest call was parked just now, growing while it waits."""
    cost_s = max(cost_of(group[0].call.key, sum(p.call.rows for p in group)), 1e-6)
    waited_s = now_s - group[0].parked_s
    return (waited_s + cost_s) / cost_s
