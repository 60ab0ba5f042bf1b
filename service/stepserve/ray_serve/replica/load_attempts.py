"""When a model that could not be loaded is tried again, and what is said of it until then."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from itertools import islice
from pathlib import Path

FIRST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 900.0
GROWTH = 2.0
# More files than any model has: a path may by mistake be that of a whole disk.
MOST_FILES = 10_000

Clock = Callable[[], float]


class LoadAttempts:
    """Tries again once the model's folder has changed and come to rest, or a pause is over.

    Each pause is twice as long as the one before, up to a limit.

    Args:
        look: what the folder holds now; equal while nothing changes.
        clock: seconds that only grow.
    """

    def __init__(self, look: Callable[[], Hashable], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._reason = ""
        self._pause_s = FIRST_PAUSE_S
        self._next_s = 0.0
        self._tried: Hashable = None
        self._seen: Hashable = None

    def begin(self) -> None:
        """It is tried now: what changes from here on is a reason to try again."""
        self._tried = self._seen = self._look()

    def failed(self, reason: str) -> None:
        """It could not be loaded."""
        self._reason = reason
        self._next_s = self._clock() + self._pause_s
        self._pause_s = min(self._pause_s * GROWTH, LONGEST_PAUSE_S)

    def succeeded(self) -> None:
        """It is loaded."""
        self._reason = ""

    def is_due(self) -> bool:
        """Whether to try again now. To be asked every few seconds."""
        before, self._seen = self._seen, self._look()
        if self._seen != self._tried and self._seen == before:
            self._pause_s = FIRST_PAUSE_S
            return True
        return self._clock() >= self._next_s

    @property
    def retry_after_s(self) -> float:
        """Seconds until it is tried again, if its folder does not change before."""
        return max(self._next_s - self._clock(), 0.0)

    @property
    def failure(self) -> str:
        """Why it is not loaded, and when it is tried again; empty where nothing went wrong."""
        if not self._reason:
            return ""
        return f"cannot be loaded: {self._reason}; {self.next_try}"

    @property
    def next_try(self) -> str:
        """When it is tried again."""
        seconds = math.ceil(self.retry_after_s)
        if not seconds:
            return "it is tried again now"
        return f"it is tried again in {seconds} s, or once its folder has changed"


def folder_state(folder: Path | None) -> Hashable:
    """The names, sizes and times of the files in a folder; what cannot be read is left out."""
    if folder is None:
        return None
    try:
        files = islice(folder.expanduser().rglob("*"), MOST_FILES)
        return frozenset(entry for path in files if (entry := _state(path)) is not None)
    except OSError:
        return frozenset()


def _state(path: Path) -> tuple[str, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_size, stat.st_mtime_ns
