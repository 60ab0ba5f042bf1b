"""How many rows may share a forward: as configured or measured, and fewer where sharing failed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from stepserve.engine.calls.call import Call

logger = logging.getLogger(__name__)

RECOVERY_FORWARDS = 64
MOST_RECOVERY_FORWARDS = 4096
STRIKES = 3
KNEE_TOLERANCE = 0.03


def knee(seconds_by_rows: Mapping[int, float], tolerance: float = KNEE_TOLERANCE) -> int:
    """The fewest rows whose rows per second are within `tolerance` of the best that was measured.

    More rows than that would make every step longer for next to no throughput. What memory did not
    allow was not measured, so it is never chosen.

    Raises:
        ValueError: nothing was measured.
    """
    rate = {rows: rows / seconds for rows, seconds in seconds_by_rows.items() if seconds > 0}
    if not rate:
        raise ValueError("no forward was measured")
    return min(rows for rows in rate if rate[rows] >= (1 - tolerance) * max(rate.values()))


@dataclass
class Lowered:
    """The limit of a shape whose sharing failed.

    Args:
        rows: the limit now.
        needed: successes at the limit after which it is doubled.
        successes: so many there were since the limit was last changed.
        strikes: failures that were not for want of memory.
        raised: whether the last change was for more rows.
    """

    rows: int
    needed: int = RECOVERY_FORWARDS
    successes: int = 0
    strikes: int = 0
    raised: bool = False

    @property
    def for_good(self) -> bool:
        """Whether it is never raised again."""
        return self.strikes >= STRIKES


class RowLimits:
    """Row limits by shape, lowered where a shared forward failed although its parts did not.

    If memory ran out, the limit is halved. Otherwise the module's arguments or outputs may be such
    that they cannot be stacked the way `call` reads them; the limit is lowered to what worked. The
    answers are right either way, as the parts run apart, but failing first at every step would cost
    more than sharing gains.

    The limit is doubled again after `RECOVERY_FORWARDS` forwards that succeeded with at least half
    of the rows it allows, until it is where it was; one more success there and all is forgotten. If
    it fails after it was raised, that number is doubled, up to `MOST_RECOVERY_FORWARDS`. After
    `STRIKES` failures that were not for want of memory the shape keeps what worked for good: if
    only single calls do, it is never stacked again.

    Args:
        denoiser_rows: most rows of a forward of the stage "denoise", where that was measured.
    """

    def __init__(self, denoiser_rows: int | None = None) -> None:
        self.denoiser_rows = denoiser_rows
        self._lowered: dict[Hashable, Lowered] = {}

    def limit(self, call: Call) -> int:
        """Most rows of one shared forward for calls like this one."""
        lowered = self._lowered.get(call.shape)
        configured = self._configured(call)
        return configured if lowered is None else min(configured, lowered.rows)

    def allows(self, call: Call, rows: int) -> bool:
        """Whether a forward for calls like this one may be filled up to so many rows."""
        lowered = self._lowered.get(call.shape)
        return lowered is None or rows <= lowered.rows

    def halve(self, call: Call, rows: int, reason: BaseException) -> None:
        """Memory ran out with that many rows."""
        self._lower(call, max(rows // 2, 1), reason)

    def lower(self, call: Call, rows: int, reason: BaseException) -> bool:
        """Only `rows` rows worked. Returns whether this made the limit last for good."""
        self._lower(call, rows, reason)
        lowered = self._lowered.setdefault(call.shape, Lowered(self._configured(call)))
        lowered.strikes += 1
        now_for_good = lowered.strikes == STRIKES
        if now_for_good:
            logger.warning("%s: that limit now stays for good", call.method.name)
        return now_for_good

    def succeeded(self, call: Call, rows: int) -> None:
        """A forward with that many rows went well."""
        lowered = self._lowered.get(call.shape)
        if lowered is None or lowered.for_good or 2 * rows < lowered.rows:
            return
        lowered.successes += 1
        if lowered.rows >= self._configured(call):
            del self._lowered[call.shape]
        elif lowered.successes >= lowered.needed:
            lowered.rows = min(2 * lowered.rows, self._configured(call))
            lowered.successes, lowered.raised = 0, True

    def _configured(self, call: Call) -> int:
        if self.denoiser_rows is None or call.method.stage != "denoise":
            return call.method.max_rows
        return min(call.method.max_rows, self.denoiser_rows)

    def _lower(self, call: Call, rows: int, reason: BaseException) -> None:
        if rows >= self.limit(call):
            return
        before = self._lowered.get(call.shape)
        if before is None:
            self._lowered[call.shape] = Lowered(rows)
        else:
            if before.raised:
                before.needed = min(2 * before.needed, MOST_RECOVERY_FORWARDS)
            before.rows, before.successes, before.raised = rows, 0, False
        logger.warning(
            "%s: a shared forward failed: at most %d rows from now on for shape %s (%s: %s)",
            call.method.name,
            rows,
            call.shape,
            type(reason).__name__,
            reason,
        )
