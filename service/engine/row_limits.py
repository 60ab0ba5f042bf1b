"""How many rows may share a forward: as configured, and fewer where sharing was seen to fail."""

from __future__ import annotations

import logging
from collections.abc import Hashable

from service.engine.call import Call

logger = logging.getLogger(__name__)


class RowLimits:
    """Row limits by shape, lowered for good when a shared forward failed and its parts did not.

    That happens when memory runs out, and when a module's arguments or outputs cannot be stacked
    the way `call` reads them. The answers are right either way, as the parts ran apart, but failing
    first at every step would cost more than sharing gains.
    """

    def __init__(self) -> None:
        self._lowered: dict[Hashable, int] = {}

    def limit(self, call: Call) -> int:
        """Most rows of one shared forward for calls like this one."""
        return min(call.method.max_rows, self._lowered.get(call.key.shape, call.method.max_rows))

    def lower(self, call: Call, rows: int, reason: BaseException) -> None:
        """Let calls of this shape share forwards of at most `rows` rows from now on."""
        if rows < self.limit(call):
            self._lowered[call.key.shape] = rows
            logger.warning(
                "%s: a shared forward failed and its parts did not: at most %d rows from now on "
                "for shape %s (%s: %s)",
                call.method.name,
                rows,
                call.key.shape[1:],
                type(reason).__name__,
                reason,
            )
