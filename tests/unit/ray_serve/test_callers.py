"""Requests whose ingress is gone."""

from __future__ import annotations

from stepserve.domain.requests import RequestKey
from stepserve.ray_serve.replica.heartbeats import IngressHeartbeats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_of_a_caller_that_falls_silent_are_orphans() -> None:
    clock = Clock()
    callers = IngressHeartbeats(clock, orphaned_after_s=10)
    for request, caller in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "")):
        callers.begin(RequestKey(request), caller)
    callers.end(RequestKey("c"))
    clock.now_s += 9
    callers.hear("two")
    assert callers.orphans() == []
    clock.now_s += 2
    assert callers.orphans() == [RequestKey("a")]
    callers.end(RequestKey("a"))
    assert callers.orphans() == []


def test_who_begins_a_request_was_heard() -> None:
    clock = Clock()
    callers = IngressHeartbeats(clock, orphaned_after_s=10)
    callers.hear("one")
    clock.now_s += 20
    callers.begin(RequestKey("a"), "one")
    assert callers.orphans() == []
