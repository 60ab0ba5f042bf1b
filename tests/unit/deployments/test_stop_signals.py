"""What signals mean to a service that runs, and to one that stops already."""

from __future__ import annotations

import signal

from service.deployments.server import ONE_WISH_S, _Signals


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_a_second_wish_to_stop_is_a_wish_to_hurry() -> None:
    clock = Clock()
    signals = _Signals(clock)
    signals.hear(signal.SIGTERM, None)
    assert signals.stopped.is_set()
    # One that a program in between has handed on as well.
    clock.now_s += ONE_WISH_S / 2
    signals.hear(signal.SIGTERM, None)
    assert not signals.hurried.is_set()
    clock.now_s += ONE_WISH_S
    signals.hear(signal.SIGINT, None)
    assert signals.hurried.is_set()


def test_a_reload_is_no_wish_to_stop() -> None:
    signals = _Signals(Clock())
    signals.hear(signal.SIGHUP, None)
    assert next(signals.reloads()) is None
    signals.hear(signal.SIGTERM, None)
    signals.hear(signal.SIGHUP, None)
    assert list(signals.reloads()) == []
    assert not signals.hurried.is_set()
