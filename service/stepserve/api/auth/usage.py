"""How much each API key uses: so many requests a minute, so many at once.

The count is kept in one place for all ingress replicas, so that limits are exact. Whoever takes
names the lease, so that it can be given back even if the response never arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from stepserve.api.auth.keys import ApiKey

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0
LEASE_S = 30.0
"""How long a lease lasts that nobody renews: its ingress is gone."""

RENEW_S = 10.0

WHOLE_TOKEN = 1 - 1e-9
"""Sums of fractions miss a whole number by a little."""


@dataclass(frozen=True)
class Rate:
    """Where a key stands: of `limit` requests `remaining` may follow at once.

    In `reset_s` seconds it may be as many as ever.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True)
class Grant:
    """A request may go ahead. `rate` is None where there is no limit on requests a minute."""

    rate: Rate | None = None


@dataclass(frozen=True)
class Refusal:
    """A request must wait."""

    message: str
    retry_after_s: float
    rate: Rate | None = None


Answer = Grant | Refusal


@dataclass
class Account:
    """What one key has left, and what it has in flight: when each lease runs out."""

    tokens: float
    filled_s: float
    leases: dict[str, float] = field(default_factory=dict)

    def rate(self, key: ApiKey) -> Rate | None:
        """What is told of the limit on requests a minute."""
        if key.requests_per_minute is None:
            return None
        depth = depth_of(key)
        missing_s = (depth - self.tokens) / key.requests_per_minute * MINUTE_S
        return Rate(int(depth), int(self.tokens + 1 - WHOLE_TOKEN), missing_s)


class UsageLedger:
    """Counts the use of keys. Pure: not for several threads, and the clock is given.

    A minute's requests may come at once (a token bucket as deep as the limit). Leases run out, in
    case who holds one dies without giving it back.

    Args:
        clock: seconds, monotonic.
        lease_s: how long a lease lasts that is not renewed.
    """

    def __init__(self, clock: Callable[[], float], lease_s: float = LEASE_S) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._accounts: dict[str, Account] = {}

    def take(self, key: ApiKey, lease: str) -> Answer:
        """Ask whether a request may go ahead now. A refusal costs nothing."""
        now_s = self._clock()
        account = self._account(key, now_s)
        refusal = _check_concurrency(key, account) or _check_rate(key, account)
        if refusal is not None:
            return refusal
        account.leases[lease] = now_s + self._lease_s
        account.tokens -= 1 if key.requests_per_minute is not None else 0
        return Grant(account.rate(key))

    def renew(self, held: Mapping[str, Collection[str]]) -> None:
        """Some requests are still in flight: their leases, by the names of their keys."""
        ends_s = self._clock() + self._lease_s
        for name, leases in held.items():
            account = self._accounts.get(name)
            if account is not None:
                account.leases.update(dict.fromkeys(leases, ends_s))

    def give_back(self, name: str, lease: str) -> None:
        """A request has ended, however it did, or was never let in."""
        account = self._accounts.get(name)
        if account is not None:
            account.leases.pop(lease, None)

    def _account(self, key: ApiKey, now_s: float) -> Account:
        depth = depth_of(key)
        account = self._accounts.setdefault(key.name, Account(depth, now_s))
        gained = (now_s - account.filled_s) * (key.requests_per_minute or 0.0) / MINUTE_S
        account.tokens = min(account.tokens + gained, depth)
        account.filled_s = now_s
        account.leases = {n: ends_s for n, ends_s in account.leases.items() if ends_s > now_s}
        return account


def depth_of(key: ApiKey) -> float:
    """How many requests may come at once."""
    return max(key.requests_per_minute or 0.0, 1.0)


class Usage(Protocol):
    """Where use is counted: in this process, or in one that all ingress replicas ask."""

    async def take(self, key: ApiKey, lease: str) -> Answer:
        """Ask whether a request may go ahead now.

        Raises:
            NotReadyError: nobody answers.
        """
        ...

    def give_back(self, name: str, lease: str) -> None:
        """A request has ended. Never waits: it is called while a request is being cancelled."""
        ...


class LocalUsage:
    """Counts in this process, which must be the only one. Its leases end with it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._ledger = UsageLedger(clock, math.inf)

    async def take(self, key: ApiKey, lease: str) -> Answer:
        """Ask whether a request may go ahead now."""
        return self._ledger.take(key, lease)

    def give_back(self, name: str, lease: str) -> None:
        """A request has ended."""
        self._ledger.give_back(name, lease)


def _check_concurrency(key: ApiKey, account: Account) -> Refusal | None:
    limit = key.max_concurrent
    if limit is None or len(account.leases) < limit:
        return None
    return Refusal(
        f"API key {key.name!r} has {len(account.leases)} requests in flight; the limit is {limit}",
        BUSY_RETRY_S,
        account.rate(key),
    )


def _check_rate(key: ApiKey, account: Account) -> Refusal | None:
    limit = key.requests_per_minute
    if limit is None or account.tokens >= WHOLE_TOKEN:
        return None
    wait_s = math.ceil((1 - account.tokens) / limit * MINUTE_S)
    return Refusal(
        f"rate limit of {limit:g} requests per minute exceeded for API key {key.name!r}",
        float(max(wait_s, 1)),
        account.rate(key),
    )
