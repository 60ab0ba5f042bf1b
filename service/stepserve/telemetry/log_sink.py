"""Brings the log lines of a local service's processes to the one that a person started.

Ray keeps what its processes write in files of its own. A datagram is one line, so lines never mix;
sending one never waits: when nobody reads, it is dropped rather than holding a request up.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

MOST_BYTES = 65_536
END = b""


class SinkHandler(logging.Handler):
    """Sends each record as one line to a sink's socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send it, or drop it."""
        line = self.format(record).encode()[:MOST_BYTES]
        with contextlib.suppress(OSError):
            self._socket.sendto(line, self._path)

    def close(self) -> None:
        """Send no more."""
        self._socket.close()
        super().close()


@contextmanager
def log_sink(stream: TextIO, within: Path | None = None) -> Iterator[str]:
    """While inside, lines that are sent to the returned path are written to `stream`.

    The path lies in the folder `within`, or in the one for temporary files.
    """
    with (
        tempfile.TemporaryDirectory(prefix="logs-", dir=within) as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        path = str(Path(folder) / "lines")
        receiver.bind(path)
        thread = threading.Thread(target=_write, args=(receiver, stream), daemon=True)
        thread.start()
        try:
            yield path
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(END, path)
            thread.join()


def _write(receiver: socket.socket, stream: TextIO) -> None:
    while line := receiver.recv(MOST_BYTES):
        # A terminal that has gone is no reason to stop serving.
        with contextlib.suppress(OSError, ValueError):
            stream.write(line.decode(errors="replace") + "\n")
            stream.flush()
