"""Which of several calls may share a forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepserve.engine.calls.call import Call, CallKey
from stepserve.engine.calls.residuals import agree


def sharing_groups(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls that may share a forward, in the order of their first ones.

    One without residuals, which agrees with all, is in the first group of its key.
    """
    of_key: dict[CallKey, list[list[Call]]] = {}
    found: list[list[Call]] = []
    for call in calls:
        groups = of_key.setdefault(call.key, [])
        group = next((group for group in groups if _may_join(call, group)), None)
        if group is None:
            group = []
            groups.append(group)
            found.append(group)
        group.append(call)
    return found


def _may_join(call: Call, calls: Sequence[Call]) -> bool:
    """Whether it may share a forward with calls of its key that already share one."""
    return not call.residuals or all(agree(call.residuals, other.residuals) for other in calls)
