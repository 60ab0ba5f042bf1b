"""When each ingress was last heard from."""

from __future__ import annotations

from stepserve.ray_serve.replica.heartbeats import IngressHeartbeats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_an_ingress_that_is_not_heard_from_is_silent() -> None:
    clock = Clock()
    heartbeats = IngressHeartbeats(clock, silent_after_s=10)
    heartbeats.hear("one")
    heartbeats.hear("two")
    clock.now_s += 9
    heartbeats.hear("two")
    assert not heartbeats.is_silent("one")
    clock.now_s += 2
    assert heartbeats.is_silent("one")
    assert not heartbeats.is_silent("two")


def test_a_silent_one_is_forgotten_and_may_come_back() -> None:
    clock = Clock()
    heartbeats = IngressHeartbeats(clock, silent_after_s=10)
    heartbeats.hear("one")
    clock.now_s += 20
    heartbeats.hear("two")
    assert heartbeats.is_silent("one")
    heartbeats.hear("one")
    assert not heartbeats.is_silent("one")
