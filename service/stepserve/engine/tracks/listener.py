"""Who hears what becomes of a piece of work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from stepserve.domain.timings import Timings

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears what becomes of a piece of work.

    `accepted` is called on the submitting thread, all others on the engine thread afterwards; one
    of `finished` and `failed` is called, once, and last. They must return quickly. What they raise
    is logged and otherwise ignored: it is no fault of the work.
    """

    def accepted(self, position: int, expected_s: float) -> None:
        """The work was let in behind `position` other pieces; it should end in `expected_s`."""

    def started(self) -> None:
        """The pipeline call begins."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The pipeline call returned `result`."""

    def failed(self, error: BaseException, timings: Timings) -> None:
        """The work was cancelled or raised."""


def tell(work_id: str, say: Callable[..., Any], *news: Any) -> None:
    """Call a listener's method; log what it raises."""
    try:
        say(*news)
    except BaseException:
        # Such as asyncio's cancellation, or a loop that was closed. Other work must not suffer.
        logger.exception("the listener of request %s raised", work_id)
