"""What the engine reports of forwards and ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import Bench, Job, job_track
from stepserve.domain.errors import CancelledError
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.states import RequestState


class Watcher:
    def __init__(self) -> None:
        self.forwards: list[ForwardReport] = []
        self.ends: list[EndReport] = []

    def forward_ended(self, report: ForwardReport) -> None:
        self.forwards.append(report)

    def request_ended(self, report: EndReport) -> None:
        self.ends.append(report)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def bench(watcher: Watcher) -> Bench:
    return Bench(observers=[watcher])


def test_each_forward_is_reported_with_what_was_predicted_of_it(bench: Bench, watcher: Watcher):
    for steps in (2, 4):
        bench.add(Job(seed=steps, steps=steps))
    bench.run()

    denoising = [report for report in watcher.forwards if report.stage == "denoise"]
    assert [report.rows for report in denoising] == bench.modules.denoiser.rows
    counters = bench.batcher.counters
    assert [report.number for report in watcher.forwards] == [*range(1, counters.forwards + 1)]
    assert sum(len(report.requests) for report in watcher.forwards) == counters.calls
    assert sum(report.rows for report in watcher.forwards) == counters.rows
    first, *later = denoising
    assert first.expected_s is None
    assert all(report.expected_s == pytest.approx(report.seconds) for report in later[:1])


def test_each_end_is_reported_once(bench: Bench, watcher: Watcher):
    bench.add(Job(seed=1, steps=2))
    bench.run()
    ear = bench.add(Job(seed=2, steps=50))
    bench.run(10)
    left = next(track for track in bench.batcher.scheduler.running)
    bench.batcher.stop_track(left.key, CancelledError("gone"))
    bench.run()

    finished, cancelled = watcher.ends
    assert (finished.state, finished.steps_left) == (RequestState.FINISHED, 0)
    assert finished.timings.denoise_s > 0
    assert cancelled.state is RequestState.CANCELLED
    assert 0 < cancelled.steps_left < 50
    assert ear.ends == ["failed"]


def test_a_batch_is_shown_without_the_ids_of_other_owners(bench: Bench):
    for owner in ("alice", "bob"):
        track = job_track(bench.modules, Job(seed=1, steps=9))
        bench.add_track(replace(track, id=f"of {owner}", owner=owner))
    bench.run(4)
    view = bench.batcher.view("alice")

    assert [(request.id, request.rows) for request in view.requests] == [("of alice", 2), (None, 2)]
    assert all(request.state is RequestState.RUNNING for request in view.requests)
    shared = view.forwards[-1]
    assert [(part.id, part.rows) for part in shared.requests] == [("of alice", 2), (None, 2)]
    assert (shared.module, shared.rows, shared.padded_rows) == ("denoiser.forward", 4, 0)
