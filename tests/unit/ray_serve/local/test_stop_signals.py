"""What signals mean to a service that runs, and to one that stops already."""

from __future__ import annotations

import signal

import pytest
from stepserve.ray_serve.local.server import ONE_WISH_S, _ended_by_signals, _Signals


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


def test_what_fails_once_an_end_is_wanted_is_no_failure() -> None:
    signals = _Signals(Clock())
    with pytest.raises(RuntimeError, match="no raylet"), _ended_by_signals(signals):
        raise RuntimeError("no raylet")
    signals.hear(signal.SIGINT, None)
    with _ended_by_signals(signals):
        raise RuntimeError("no raylet")


def test_an_end_by_rays_own_handler_is_one_that_was_wanted() -> None:
    signals = _Signals(Clock())
    with _ended_by_signals(signals):
        raise SystemExit(15)
    assert signals.stopped.is_set()
