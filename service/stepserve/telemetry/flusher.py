"""Runs something again and again in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0


class Flusher:
    """Calls `flush` every second until stopped, and once more then. What it raises is logged."""

    def __init__(
        self,
        flush: Callable[[], None],
        interval_s: float = FLUSH_INTERVAL_S,
        name: str = "telemetry",
    ) -> None:
        self._flush = flush
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Flush what is left, and end."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._try_to_flush()
        self._try_to_flush()

    def _try_to_flush(self) -> None:
        try:
            self._flush()
        except Exception:
            # Watching must never end what is watched.
            logger.exception("what was observed could not be recorded")
