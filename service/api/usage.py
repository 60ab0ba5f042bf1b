"""How much each API key uses: so many requests a minute, so many at once.

The count is kept in one place for all ingress replicas, so that limits are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from service.api.keys import ApiKey

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0
# Who waits exactly as long as told must not be sent away again.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Grant:
    """A request may go ahead. `lease` is to be given back when it has ended.

    `remaining` requests may follow at once, and `reset_s` later as many as ever; both are None
    where there is no limit on requests a minute.
    """

    lease: int
    remaining: int | None = None
    reset_s: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A request must wait."""

    message: str
    retry_after_s: float


Answer = Grant | Refusal


@dataclass
class Account:
    """What one key has left, and what it has at work: when each lease runs out."""

    tokens: float
    filled_s: float
    leases: dict[int, float] = field(default_factory=dict)


class UsageLedger:
    """Counts the use of keys. Pure: not for several threads, and the clock is given.

    A minute's requests may come at once (a token bucket as deep as the limit). Leases run out, in
    case who holds one dies without giving it back.

    Args:
        clock: seconds, monotonic.
        lease_s: how long a request may take at most, in seconds.
    """

    def __init__(self, clock: Callable[[], float], lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._accounts: dict[str, Account] = {}
        self._granted = 0

    def take(self, key: ApiKey) -> Answer:
        """Ask whether a request may go ahead now."""
        now_s = self._clock()
        account = self._account(key, now_s)
        refusal = _check_concurrency(key, account) or _check_rate(key, account)
        if refusal is not None:
            return refusal
        self._granted += 1
        account.leases[self._granted] = now_s + self._lease_s
        if key.requests_per_minute is None:
            return Grant(self._granted)
        account.tokens -= 1
        missing = key.requests_per_minute - account.tokens
        reset_s = missing / key.requests_per_minute * MINUTE_S
        return Grant(self._granted, int(account.tokens), reset_s)

    def give_back(self, name: str, lease: int) -> None:
        """A request has ended, however it did."""
        account = self._accounts.get(name)
        if account is not None:
            account.leases.pop(lease, None)

    def _account(self, key: ApiKey, now_s: float) -> Account:
        depth = max(key.requests_per_minute or 0.0, 1.0)
        account = self._accounts.setdefault(key.name, Account(depth, now_s))
        gained = (now_s - account.filled_s) * (key.requests_per_minute or 0.0) / MINUTE_S
        account.tokens = min(account.tokens + gained, depth)
        account.filled_s = now_s
        account.leases = {n: ends_s for n, ends_s in account.leases.items() if ends_s > now_s}
        return account


class Usage(Protocol):
    """Where use is counted: in this process, or in one that all ingress replicas ask."""

    async def take(self, key: ApiKey) -> Answer:
        """Ask whether a request may go ahead now."""
        ...

    async def give_back(self, name: str, lease: int) -> None:
        """A request has ended."""
        ...


class LocalUsage:
    """Counts in this process, which must be the only one."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger

    async def take(self, key: ApiKey) -> Answer:
        """Ask whether a request may go ahead now."""
        return self._ledger.take(key)

    async def give_back(self, name: str, lease: int) -> None:
        """A request has ended."""
        self._ledger.give_back(name, lease)


def _check_concurrency(key: ApiKey, account: Account) -> Refusal | None:
    limit = key.max_concurrent
    if limit is None or len(account.leases) < limit:
        return None
    return Refusal(
        f"API key {key.name!r} has {len(account.leases)} requests at work; the limit is {limit}",
        BUSY_RETRY_S,
    )


def _check_rate(key: ApiKey, account: Account) -> Refusal | None:
    limit = key.requests_per_minute
    if limit is None or account.tokens >= 1 - ROUNDING:
        return None
    wait_s = math.ceil((1 - account.tokens) / limit * MINUTE_S)
    return Refusal(
        f"API key {key.name!r} has sent its {limit:g} requests of a minute", float(wait_s)
    )
