"""What the batcher tells of forwards and ends."""

from __future__ import annotations

import pytest
from engine_fakes import Bench, Job
from stepserve.domain.errors import CancelledError
from stepserve.domain.states import RequestState
from stepserve.engine.loop.observer import ForwardReport, WorkReport


class Watcher:
    def __init__(self) -> None:
        self.forwards: list[ForwardReport] = []
        self.endings: list[WorkReport] = []

    def forward_ended(self, report: ForwardReport) -> None:
        self.forwards.append(report)

    def work_ended(self, report: WorkReport) -> None:
        self.endings.append(report)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def watcher(bench: Bench) -> Watcher:
    watcher = Watcher()
    bench.batcher.observer = watcher
    return watcher


def test_each_forward_is_told_with_what_was_foretold_of_it(bench: Bench, watcher: Watcher):
    for steps in (2, 4):
        bench.add(Job(seed=steps, steps=steps))
    bench.run()

    told = [(report.stage, report.calls, report.rows) for report in watcher.forwards]
    denoising = [item for item in told if item[0] == "denoise"]
    assert [rows for _, _, rows in denoising] == bench.modules.denoiser.rows
    assert sum(calls for _, calls, _ in told) == bench.batcher.counters.calls
    assert sum(rows for _, _, rows in told) == bench.batcher.counters.rows
    first, *later = [r for r in watcher.forwards if r.stage == "denoise"]
    assert first.expected_s is None
    assert all(report.expected_s == pytest.approx(report.seconds) for report in later[:1])


def test_each_end_is_told_once(bench: Bench, watcher: Watcher):
    bench.add(Job(seed=1, steps=2))
    bench.run()
    ear = bench.add(Job(seed=2, steps=50))
    bench.run(10)
    left = next(track for track in bench.batcher.active)
    bench.batcher.stop_track(left.work.key, CancelledError("gone"))
    bench.run()

    finished, cancelled = watcher.endings
    assert (finished.state, finished.steps_left) == (RequestState.FINISHED, 0)
    assert finished.timings.denoise_s > 0
    assert cancelled.state is RequestState.CANCELLED
    assert 0 < cancelled.steps_left < 50
    assert ear.ends == ["failed"]
