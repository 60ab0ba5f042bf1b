"""A device that runs on while Python wakes tracks: what is waited for, and when it is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_fakes import Bench, FakeClock, Job, alone
from stepserve.engine.loop.execution import Execution
from stepserve.engine.loop.timing import WallTiming, timing_for
from stepserve.engine.tracks.track import Track

DEVICE_S = 0.25


class Device:
    """Computes later than Python: a log of what was launched, woken and waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self, clock: FakeClock) -> RunningOn:
        return RunningOn(self, clock)

    def note_waking(self, track: Track) -> None:
        """Log when a track is given an output."""
        resume = track.resume

        def noted(output: Any) -> None:
            self.log.append("woken")
            resume(output)

        track.resume = noted


class RunningOn:
    runs_on = True

    def __init__(self, device: Device, clock: FakeClock) -> None:
        self.device = device
        self.started_s = clock()

    def launched(self) -> None:
        self.device.log.append("launched")

    def has_ended(self) -> bool:
        return False

    def wait(self) -> float:
        self.device.log.append("waited")
        return DEVICE_S


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def bench(device: Device) -> Bench:
    return Bench(execution=Execution(start_timing=device.start))  # type: ignore[arg-type]


def test_tracks_are_woken_before_their_forward_is_waited_for(bench: Bench, device: Device) -> None:
    jobs = [Job(seed=seed, steps=3) for seed in (1, 2)]
    ears = [bench.add(job) for job in jobs]
    for track in bench.batcher.scheduler.queued:
        device.note_waking(track)
    bench.run()

    step = ["launched", "woken", "woken", "waited"]
    # What encoders and decoders made is wanted at once.
    at_once = ["launched", "waited", "woken", "woken"]
    assert device.log == [*at_once, *3 * step, *at_once]
    for job, ear in zip(jobs, ears, strict=True):
        assert torch.equal(ear.result, alone(job))


def test_the_seconds_that_are_learned_are_the_devices(bench: Bench, device: Device) -> None:
    bench.add(Job(seed=1, steps=3))
    bench.run()
    counters = bench.batcher.counters
    assert counters.forward_s == pytest.approx(DEVICE_S * counters.forwards)
    assert counters.denoiser_s == pytest.approx(DEVICE_S * 3)


def test_a_cpu_has_ended_when_python_goes_on() -> None:
    clock = FakeClock()
    timing = timing_for(torch.device("cpu"))(clock)
    assert isinstance(timing, WallTiming)
    assert not timing.runs_on
    clock.advance(2.0)
    timing.launched()
    clock.advance(5.0)
    assert timing.has_ended()
    assert (timing.started_s, timing.wait()) == (100.0, 2.0)
