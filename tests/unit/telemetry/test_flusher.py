from __future__ import annotations

import threading

import pytest
from stepserve.telemetry.flusher import Flusher


def test_flushes_again_and_again_and_once_at_the_end():
    flushed, twice = [], threading.Event()

    def flush() -> None:
        flushed.append(1)
        if len(flushed) == 2:
            twice.set()

    flusher = Flusher(flush, interval_s=0.001)
    flusher.start()
    assert twice.wait(10)
    flusher.stop()
    number = len(flushed)
    flusher.stop()
    assert len(flushed) == number


def test_goes_on_after_an_error(caplog: pytest.LogCaptureFixture):
    recovered = threading.Event()
    errors = [ValueError("first")]

    def flush() -> None:
        if errors:
            raise errors.pop()
        recovered.set()

    flusher = Flusher(flush, interval_s=0.001)
    flusher.start()
    assert recovered.wait(10)
    flusher.stop()
    assert "what was observed could not be recorded" in caplog.text


def test_one_that_never_began_can_be_stopped():
    Flusher(lambda: None).stop()
