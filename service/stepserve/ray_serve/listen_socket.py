"""The listening socket of a local service: held by its starter, handed to the ingress.

Whoever connects while no ingress is there, because it starts or one that was killed is replaced,
waits in the socket's queue instead of being refused. Several ingress replicas take turns on it.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepserve.domain.errors import StepserveError

QUEUE_LENGTH = 2048
# Any byte: a descriptor travels beside data only.
NOTE = b"."
# An ingress that waits for ever while it is built is never replaced.
RECEIVE_TIMEOUT_S = 10.0
# No descriptors left, for example: some will be free again.
PAUSE_S = 0.1


class AddressTakenError(StepserveError):
    """The service cannot listen where it was told to; the message says why."""


def rest(closed: threading.Event) -> None:
    """Wait a little before the next try, but no longer than the socket is held."""
    closed.wait(PAUSE_S)


@contextmanager
def held_listen_socket(
    host: str,
    port: int,
    within: Path | None = None,
    rest: Callable[[threading.Event], None] = rest,
) -> Iterator[str]:
    """Listen on an address. Yields the path where processes of this user get the socket.

    Args:
        host: the address.
        port: of it.
        within: a folder for that path; None: the one for temporary files.
        rest: called when nobody can be let in, with what is set once the socket is no longer held.

    Raises:
        AddressTakenError: somebody listens there, or it is no address of this machine.
    """
    with (
        _listening(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="listen-", dir=within) as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as giver,
    ):
        path = str(Path(folder) / "socket")
        giver.bind(path)
        giver.listen()
        closed = threading.Event()
        threading.Thread(
            target=_hand_out, args=(listener, giver, closed, rest), daemon=True
        ).start()
        try:
            yield path
        finally:
            closed.set()
            # Closing alone would not wake the thread.
            giver.shutdown(socket.SHUT_RDWR)


def receive_listen_socket(path: str) -> socket.socket:
    """The socket behind such a path: the same queue, whoever accepts from it.

    Raises:
        OSError: its holder is gone, or does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as receiver:
        receiver.settimeout(RECEIVE_TIMEOUT_S)
        receiver.connect(path)
        _, descriptors, _, _ = socket.recv_fds(receiver, len(NOTE), maxfds=1)
    if not descriptors:
        raise ConnectionError(f"whoever held the socket at {path} did not hand it over")
    return socket.socket(fileno=descriptors[0])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(QUEUE_LENGTH)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise AddressTakenError(f"cannot listen on {host} port {port}: {reason}") from error
    return listener


def _hand_out(
    listener: socket.socket,
    giver: socket.socket,
    closed: threading.Event,
    rest: Callable[[threading.Event], None],
) -> None:
    while not closed.is_set():
        try:
            receiver, _ = giver.accept()
        except OSError:
            rest(closed)
            continue
        # One that left in between is no reason not to hand it to others.
        with receiver, contextlib.suppress(OSError):
            socket.send_fds(receiver, [NOTE], [listener.fileno()])
