"""The connections of one process, and which of them give way where there are too many."""

from __future__ import annotations

import resource
from typing import Protocol

RESERVED_DESCRIPTORS = 256
"""Of a process, for everything but connections."""


class Connection(Protocol):
    """One connection, and the address of its client."""

    address: str

    def give_way(self) -> None:
        """Close it, at once."""


class OpenConnections:
    """At most `most` connections: another one takes the place of that whose client is awaited.

    A connection is awaited while it is silent, or a request of it has not arrived as a whole. Of
    the address that has most of these, the one that has been so for longest gives way first. Those
    whose requests are being worked on stay.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[Connection] = set()
        self._awaited: dict[str, dict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """Take in a new one; False if none gives way to it, so that it must be refused."""
        self._open.add(connection)
        if len(self._open) > self.most:
            if not self._awaited:
                return False
            of_address = max(self._awaited.values(), key=len)
            longest = next(iter(of_address))
            self.work(longest)
            longest.give_way()
        self.await_client(connection)
        return True

    def await_client(self, connection: Connection) -> None:
        """From now on it waits for its client."""
        if connection in self._open:
            self.work(connection)
            self._awaited.setdefault(connection.address, {})[connection] = None

    def work(self, connection: Connection) -> None:
        """From now on its client waits."""
        of_address = self._awaited.get(connection.address, {})
        of_address.pop(connection, None)
        if not of_address:
            self._awaited.pop(connection.address, None)

    def remove(self, connection: Connection) -> None:
        """It is gone."""
        self._open.discard(connection)
        self.work(connection)


def affordable_connections(most: int) -> int:
    """`most`, or fewer if this process may not open as many descriptors; its own limit is raised.

    Without a descriptor nothing works any more, not even telling that there are none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - RESERVED_DESCRIPTORS)
    return most
