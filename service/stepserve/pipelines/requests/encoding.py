"""Finished images wait for the one thread that makes files of them: counted, and bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stepserve.domain.errors import ServerFullError

RETRY_AFTER_S = 1.0
"""Making a file takes a fraction of a second."""


Telling = Callable[[], None]
"""Tells of files that were made."""


class ImageEncoder:
    """One thread, so that previews and images stay in order.

    Args:
        most_images: that may wait before new requests are refused.
    """

    def __init__(self, most_images: int) -> None:
        self._most = most_images
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

    def check_room(self) -> None:
        """Return if new requests may be let in.

        Raises:
            ServerFullError: too many images wait.
        """
        if self._waiting >= self._most:
            raise ServerFullError(
                f"the server is full: {self._waiting} finished images wait to be encoded and the "
                f"limit is {self._most}",
                RETRY_AFTER_S,
            )

    def submit(self, images: int, encode: Callable[[], Telling]) -> None:
        """Make files of so many images when it is their turn, and say so.

        Raises:
            RuntimeError: it has ended.
        """
        self._count(images)
        try:
            self._thread.submit(self._run, images, encode)
        except RuntimeError:
            self._count(-images)
            raise

    def shutdown(self) -> None:
        """Finish what waits, and end."""
        self._thread.shutdown(wait=True)

    def _run(self, images: int, encode: Callable[[], Telling]) -> None:
        try:
            telling = encode()
        finally:
            self._count(-images)
        # Afterwards, as whoever is told may send the next request at once.
        telling()

    def _count(self, images: int) -> None:
        with self._lock:
            self._waiting += images
