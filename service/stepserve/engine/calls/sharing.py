"""Which of several calls may share a forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepserve.engine.calls.call import Call
from stepserve.engine.calls.call_key import CallKey
from stepserve.engine.calls.residuals import agree


def sharing_groups(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls that may share a forward, in the order of their first ones.

    One without residuals, which agrees with all, is in the first group of its key, if its rows are
    as long as they must be there.
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
    if call.residuals and not all(agree(call.residuals, other.residuals) for other in calls):
        return False
    return not call.tokens or not calls or _agree_in_length([call, *calls])


def _agree_in_length(calls: Sequence[Call]) -> bool:
    """Whether all are as long, or need not be.

    Layers that do something of its own to each row cut their inputs into rows of equal length.
    """
    is_plain = all(call.module_variant is None for call in calls)
    return is_plain or len({call.tokens for call in calls}) == 1
