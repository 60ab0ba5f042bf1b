"""Random submissions, cancellations, failures and shortages: nobody goes unanswered."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from typing import Any, cast

import greenlet
import pytest
import torch
from engine_fakes import Denoiser, Ear, FakeClock, Job, Modules, alone, job_track
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from stepserve.domain.errors import CancelledError, ExpiredError
from stepserve.domain.requests import RequestKey
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.tracks.track import Track

from loadtests.policies import DUE_TIME

# Submissions (some of which fail or expire), cancellations and changes of memory.
ACTIONS = {"total": 0}


class Moody(Denoiser):
    """A denoiser that runs out of memory above `fits` rows."""

    fits = 1000

    def spend(self, value: torch.Tensor) -> None:
        if value.shape[0] > self.fits:
            raise torch.OutOfMemoryError("simulated")
        super().spend(value)


class Lives(RuleBasedStateMachine):
    """A batcher and what becomes of everything that was ever submitted to it."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = Modules(FakeClock(), max_rows=8)
        self.modules.denoiser.__class__ = Moody
        self.ended: list[str] = []
        self.batcher = Batcher(
            8,
            clock=self.modules.clock,
            on_ended=lambda track: self.ended.append(track.id),
            policy=DUE_TIME,
        )
        self.jobs: dict[str, Job] = {}
        self.ears: dict[str, Ear] = {}
        self.deadlines: set[str] = set()
        self.cancelled: set[str] = set()
        self.kept: list[weakref.ref[Any]] = []

    def _track(self, job: Job, priority: int, deadline_s: float | None) -> Track:
        kept, modules = self.kept, self.modules

        def run() -> Any:
            sentinel = torch.zeros(1)
            kept.append(weakref.ref(sentinel))
            kept.append(weakref.ref(greenlet.getcurrent()))
            return job.run(modules)

        track = replace(job_track(modules, job, Ear()), clock=modules.clock)
        return replace(track, run=run, priority=priority, deadline_s=deadline_s)

    @rule(
        steps=st.integers(1, 6),
        rows=st.integers(1, 4),
        priority=st.integers(0, 2),
        deadline_s=st.sampled_from([None, None, None, 0.05, 0.4, 60.0]),
        trouble=st.sampled_from(["", "", "", "", "raises", "poisoned"]),
    )
    def submit(
        self, steps: int, rows: int, priority: int, deadline_s: float | None, trouble: str
    ) -> None:
        name = str(len(self.jobs))
        job = Job(
            seed=len(self.jobs),
            steps=steps,
            rows=rows,
            raises_at=steps // 2 if trouble == "raises" else None,
            poisoned_at=steps // 2 if trouble == "poisoned" else None,
        )
        track = self._track(job, priority, deadline_s)
        self.jobs[name], self.ears[name] = job, cast(Ear, track.listener)
        if deadline_s is not None:
            self.deadlines.add(name)
        self.batcher.scheduler.add(track)
        ACTIONS["total"] += 1

    @rule(ticks=st.integers(1, 5))
    def tick(self, ticks: int) -> None:
        for _ in range(ticks):
            self.batcher.tick()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.jobs)))
        self.cancelled.add(name)
        self.batcher.stop_track(RequestKey(name), CancelledError("gone"))
        assert len(self.ears[name].ends) == 1
        ACTIONS["total"] += 1

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.modules.clock.advance(seconds)

    @rule(rows=st.sampled_from([3, 5, 1000]))
    def change_memory(self, rows: int) -> None:
        cast(Any, self.modules.denoiser).fits = rows
        ACTIONS["total"] += 1

    @invariant()
    def everyone_is_answered_once_or_still_in_flight(self) -> None:
        in_flight = {track.id for track in self.batcher.scheduler.tracks}
        for name, ear in self.ears.items():
            assert len(ear.ends) == (name not in in_flight)
        assert sorted(self.ended) == sorted(set(self.jobs) - in_flight)

    def teardown(self) -> None:
        while self.batcher.tick():
            pass
        for name, ear in self.ears.items():
            self._check_end(name, ear)
        assert sorted(self.ended) == sorted(self.jobs)
        assert not self.batcher.scheduler.running
        assert not self.batcher.scheduler.queued
        # What a result is made of belongs to the one who asked; all else is gone.
        assert [r() for r in self.kept if r() is not None] == []

    def _check_end(self, name: str, ear: Ear) -> None:
        job = self.jobs[name]
        assert len(ear.ends) == 1
        if ear.ends == ["finished"]:
            assert torch.equal(ear.result, alone(job))
            assert job.raises_at is None
            assert job.poisoned_at is None
        elif isinstance(ear.error, CancelledError):
            assert name in self.cancelled
        elif isinstance(ear.error, ExpiredError):
            assert name in self.deadlines
        else:
            alone_too_large = isinstance(ear.error, torch.OutOfMemoryError) and job.rows > 3
            assert job.raises_at is not None or job.poisoned_at is not None or alone_too_large


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_two_thousand_random_actions_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # pytest would keep the records, and their tracebacks the frames.
    for module in ("tracks.track", "scheduling.row_limits"):
        caplog.set_level(logging.CRITICAL, f"stepserve.engine.{module}")
    before, ACTIONS["total"] = live_tensors(), 0
    Lives.TestCase.settings = settings(
        max_examples=120,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    Lives.TestCase().runTest()
    assert ACTIONS["total"] >= 2000
    assert live_tensors() <= before
