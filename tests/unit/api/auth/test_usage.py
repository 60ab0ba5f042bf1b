"""Limits of API keys, with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from api_fakes import Clock
from hypothesis import given
from hypothesis import strategies as st
from stepserve.api.auth.keys import ApiKey
from stepserve.api.auth.usage import (
    LEASE_S,
    MINUTE_S,
    Grant,
    LocalUsage,
    Rate,
    Refusal,
    UsageLedger,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> UsageLedger:
    return UsageLedger(clock)


def key(
    requests_per_minute: float | None = None, max_concurrent: int | None = None, name: str = "app"
) -> ApiKey:
    return ApiKey(
        name=name,
        sha256="0" * 64,
        requests_per_minute=requests_per_minute,
        max_concurrent=max_concurrent,
    )


def take_all(ledger: UsageLedger, api_key: ApiKey, leases: Iterable[str]) -> list[bool]:
    return [isinstance(ledger.take(api_key, lease), Grant) for lease in leases]


def test_a_minutes_requests_may_come_at_once_and_no_more(ledger: UsageLedger):
    assert take_all(ledger, key(3), "abcd") == [True, True, True, False]


def test_what_is_told_of_the_rate(ledger: UsageLedger, clock: Clock):
    limited = key(6)

    assert ledger.take(limited, "a") == Grant(Rate(limit=6, remaining=5, reset_s=10))
    assert ledger.take(limited, "b") == Grant(Rate(limit=6, remaining=4, reset_s=20))
    clock.now_s += 10
    assert ledger.take(limited, "c") == Grant(Rate(limit=6, remaining=4, reset_s=20))
    assert ledger.take(key(name="other"), "d") == Grant(None)


def test_a_refusal_says_when_to_come_back_and_costs_nothing(ledger: UsageLedger, clock: Clock):
    limited = key(2)
    take_all(ledger, limited, "ab")
    refusals = [ledger.take(limited, lease) for lease in "cde"]

    assert refusals[0] == refusals[2]
    assert isinstance(refusals[0], Refusal)
    assert refusals[0].retry_after_s == 30
    assert refusals[0].rate == Rate(limit=2, remaining=0, reset_s=60)
    assert "rate limit of 2 requests per minute exceeded for API key 'app'" in refusals[0].message
    clock.now_s += 30
    assert isinstance(ledger.take(limited, "f"), Grant)


@given(
    st.floats(0.05, 5000, allow_nan=False),
    st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=60),
)
def test_retry_after_is_honest(requests_per_minute: float, pauses: list[float]):
    """Who waits as long as told, and finds nobody else, is let in."""
    clock, limited = Clock(), key(requests_per_minute)
    ledger = UsageLedger(clock)
    for number, pause_s in enumerate(pauses):
        clock.now_s += pause_s
        response = ledger.take(limited, str(number))
        if isinstance(response, Refusal):
            clock.now_s += response.retry_after_s
            assert isinstance(ledger.take(limited, f"{number} again"), Grant)


@given(
    st.floats(0.05, 600, allow_nan=False),
    st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=80),
)
def test_no_minute_has_more_than_the_limit_allows(requests_per_minute: float, pauses: list[float]):
    """A token bucket: at most its depth, and what flowed in meanwhile."""
    clock, limited = Clock(), key(requests_per_minute)
    ledger = UsageLedger(clock)
    granted_s = []
    for number, pause_s in enumerate(pauses):
        clock.now_s += pause_s
        if isinstance(ledger.take(limited, str(number)), Grant):
            granted_s.append(clock.now_s)
    for first, start_s in enumerate(granted_s):
        for last in range(first, len(granted_s)):
            flowed = (granted_s[last] - start_s) * requests_per_minute / MINUTE_S
            assert last - first + 1 <= max(requests_per_minute, 1) + flowed + 1e-6


def test_so_many_at_once(ledger: UsageLedger):
    limited = key(max_concurrent=2)

    assert take_all(ledger, limited, "abc") == [True, True, False]
    ledger.give_back("app", "a")
    assert take_all(ledger, limited, "de") == [True, False]
    refusal = ledger.take(limited, "f")
    assert isinstance(refusal, Refusal)
    assert refusal.message == "API key 'app' has 2 requests in flight; the limit is 2"
    assert refusal.retry_after_s >= 1


def test_too_many_at_once_do_not_use_up_the_rate(ledger: UsageLedger):
    limited = key(2, max_concurrent=1)
    take_all(ledger, limited, "abcd")
    ledger.give_back("app", "a")

    assert take_all(ledger, limited, "e") == [True]


def test_giving_back_twice_or_what_was_never_given_is_harmless(ledger: UsageLedger):
    limited = key(max_concurrent=1)
    ledger.give_back("nobody", "x")
    take_all(ledger, limited, "a")
    for _ in range(2):
        ledger.give_back("app", "a")
        ledger.give_back("app", "refused")

    assert take_all(ledger, limited, "bc") == [True, False]


def test_leases_that_nobody_renews_run_out(ledger: UsageLedger, clock: Clock):
    limited = key(max_concurrent=2)
    take_all(ledger, limited, ["lost", "kept"])
    for _ in range(4):
        clock.now_s += LEASE_S / 2
        ledger.renew({"app": ["kept"], "unknown": ["x"]})

    assert take_all(ledger, limited, "ab") == [True, False]


def test_a_lease_that_ran_out_by_mistake_counts_again_once_renewed(
    ledger: UsageLedger, clock: Clock
):
    limited = key(max_concurrent=1)
    take_all(ledger, limited, "a")
    clock.now_s += 2 * LEASE_S
    assert take_all(ledger, key(name="other"), "x") == [True]
    ledger.renew({"app": ["a"]})

    assert take_all(ledger, limited, "b") == [False]


def test_keys_do_not_share(ledger: UsageLedger):
    assert take_all(ledger, key(1, name="one"), "ab") == [True, False]
    assert take_all(ledger, key(1, name="two"), "ab") == [True, False]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=60))
def test_never_more_at_work_than_allowed(moves: list[tuple[int, int]]):
    """Whatever the order in which requests come, end, or are lost."""
    clock, limited = Clock(), key(max_concurrent=2)
    ledger = UsageLedger(clock)
    in_flight: dict[str, float] = {}
    for number, (move, which) in enumerate(moves):
        in_flight = {lease: ends_s for lease, ends_s in in_flight.items() if ends_s > clock.now_s}
        if move == 0:
            let_in = isinstance(ledger.take(limited, str(number)), Grant)
            assert let_in == (len(in_flight) < 2)
            if let_in:
                in_flight[str(number)] = clock.now_s + LEASE_S
        elif move == 1 and in_flight:
            lease = sorted(in_flight)[which % len(in_flight)]
            ledger.give_back("app", lease)
            del in_flight[lease]
        else:
            clock.now_s += LEASE_S / 3 * which


async def test_in_one_process_leases_end_when_given_back(clock: Clock):
    usage, limited = LocalUsage(clock), key(max_concurrent=1)
    assert isinstance(await usage.take(limited, "a"), Grant)
    clock.now_s += 1e9
    assert isinstance(await usage.take(limited, "b"), Refusal)
    usage.give_back("app", "a")

    assert isinstance(await usage.take(limited, "c"), Grant)
