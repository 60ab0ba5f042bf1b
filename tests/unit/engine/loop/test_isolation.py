"""What one request does wrong is its own affair."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import greenlet
import pytest
import torch
from engine_fakes import (
    Bench,
    Ear,
    FakeClock,
    Job,
    Modules,
    PoisonedError,
    alone,
    make_parkable,
    make_track,
)
from stepserve.domain.errors import CancelledError, GenerationFailedError
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.tracks.track import as_stepserve_error


def finished_as_alone(ear: Ear, job: Job) -> bool:
    return ear.ends == ["finished"] and torch.equal(ear.result, alone(job))


@pytest.mark.parametrize("place", range(8))
def test_one_poisoned_call_in_a_stack_of_eight_fails_alone(place: int) -> None:
    bench = Bench()
    jobs = [Job(seed=seed, steps=4, poisoned_at=2 if seed == place else None) for seed in range(8)]
    ears = [bench.add(job) for job in jobs]
    bench.run()
    for seed, (ear, job) in enumerate(zip(ears, jobs, strict=True)):
        if seed == place:
            assert ear.ends == ["failed"]
            assert isinstance(ear.error, PoisonedError)
            assert ear.error.__context__ is None
        else:
            assert finished_as_alone(ear, job)
    # Eight, the guilty four and the guilty two were tried and failed.
    assert bench.batcher.counters.retries == 3
    # Nobody shares less because of it.
    assert bench.modules.denoiser.rows[-1] == 14


def test_several_poisoned_calls_are_all_found() -> None:
    bench = Bench()
    jobs = [Job(seed=s, poisoned_at=0 if s in (0, 3, 4) else None) for s in range(6)]
    ears = [bench.add(job) for job in jobs]
    bench.run()
    assert [ear.ends for ear in ears] == [
        ["failed"] if seed in (0, 3, 4) else ["finished"] for seed in range(6)
    ]


def test_raising_in_own_python_fails_alone() -> None:
    bench = Bench()
    jobs = [Job(seed=seed, steps=4, raises_at=2 if seed == 1 else None) for seed in range(3)]
    ears = [bench.add(job) for job in jobs]
    bench.run()
    assert isinstance(ears[1].error, ValueError)
    assert finished_as_alone(ears[0], jobs[0])
    assert finished_as_alone(ears[2], jobs[2])
    assert bench.batcher.counters.retries == 0


@pytest.mark.parametrize(
    "error", [greenlet.GreenletExit("leaving"), SystemExit(3), KeyboardInterrupt(), MemoryError()]
)
def test_whatever_a_pipeline_raises_is_a_failure(error: BaseException) -> None:
    bench = Bench()

    def run() -> None:
        bench.modules.encoder(torch.zeros(1, 4))
        raise error

    ear = bench.add_track(make_track(run, name="odd"))
    neighbour = Job(seed=1)
    other = bench.add(neighbour)
    bench.run()
    assert ear.ends == ["failed"]
    assert ear.error is error
    assert finished_as_alone(other, neighbour)


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("out of memory")])
def test_whatever_a_module_raises_is_a_failure_of_its_call(error: BaseException) -> None:
    bench = Bench()

    class Bad(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            raise error

    bad = Bad()
    make_parkable(bad, "bad", "forward", stage="denoise")
    ear = bench.add_track(make_track(lambda: bad(torch.zeros(1, 4))))
    other = bench.add(Job(seed=1))
    bench.run()
    assert ear.error is error
    assert other.ends == ["finished"]


def test_a_pipeline_may_catch_a_module_error_and_go_on() -> None:
    bench = Bench()

    def run() -> str:
        try:
            bench.modules.encoder(torch.full((1, 4), float("nan")))
        except PoisonedError:
            bench.modules.encoder(torch.zeros(1, 4))
        return "recovered"

    ear = bench.add_track(make_track(run))
    bench.run()
    assert ear.result == "recovered"


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_pipeline_that_catches_its_cancellation_ends_all_the_same(
    caught: type[BaseException],
) -> None:
    bench = Bench()
    calls = 0

    def run() -> str:
        nonlocal calls
        for _ in range(10):
            try:
                bench.modules.encoder(torch.zeros(1, 4))
                calls += 1
            except caught:
                continue
        return "as if nothing had happened"

    ear = bench.add_track(make_track(run, name="stubborn"))
    bench.run(3)
    error = CancelledError("gone")
    bench.batcher.stop_track(RequestKey("stubborn"), error)
    assert ear.ends == ["failed"]
    assert ear.error is error
    assert calls == 3
    assert bench.run() == 0


def sharing(forward: Callable[..., Any], calls: int, steps: int) -> tuple[Bench, list[Ear]]:
    """Several requests that call a module of their own `steps` times."""
    bench = Bench()
    module = torch.nn.Module()
    module.forward = forward
    make_parkable(module, "module", "forward", stage="denoise")

    def run(seed: int) -> list[Any]:
        return [module(torch.full((2, 3), float(seed))) for _ in range(steps)]

    ears = [
        bench.add_track(make_track(partial(run, seed), name=str(seed))) for seed in range(calls)
    ]
    return bench, ears


def test_an_output_without_rows_is_never_handed_to_several(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The mean over a stack is nobody's: the calls run apart, and are not stacked again."""
    bench, ears = sharing(lambda sample: sample.mean(), calls=4, steps=5)
    with caplog.at_level(logging.WARNING):
        bench.run()
    for seed, ear in enumerate(ears):
        assert [value.item() for value in ear.result] == [float(seed)] * 5
    assert bench.batcher.counters.retries == 3
    assert "at most 2 rows from now on" in caplog.text


def test_a_module_that_cannot_take_stacked_calls_is_soon_left_alone() -> None:
    def forward(sample: torch.Tensor) -> torch.Tensor:
        if sample.shape[0] > 2:
            raise RuntimeError("expected 2 rows")
        return sample + 1

    bench, ears = sharing(forward, calls=8, steps=6)
    bench.run()
    assert all(ear.ends == ["finished"] for ear in ears)
    assert bench.batcher.counters.retries == 7


def test_running_out_of_memory_lowers_the_row_limit_to_what_fits() -> None:
    def forward(sample: torch.Tensor) -> torch.Tensor:
        if sample.shape[0] > 9:
            raise torch.OutOfMemoryError("too many rows")
        return sample + 1

    bench, ears = sharing(forward, calls=8, steps=6)
    bench.run()
    assert all(ear.ends == ["finished"] for ear in ears)
    assert bench.batcher.counters.retries == 1
    assert bench.batcher.counters.forwards == 12


class RaisingEar(Ear):
    """A listener with a mistake of its own."""

    def _raise(self) -> None:
        raise RuntimeError(f"the listener broke at {self.news[-1]}")

    def started(self) -> None:
        super().started()
        self._raise()

    def finished(self, result: Any, timings: Any) -> None:
        super().finished(result, timings)
        raise SystemExit

    def failed(self, error: BaseException, timings: Any) -> None:
        super().failed(error, timings)
        self._raise()


def test_a_listener_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    modules = bench.modules
    fine_job = Job(seed=1)
    fine = bench.add(fine_job)
    ends = bench.add_track(make_track(lambda: Job(seed=2).run(modules), name="2", ear=RaisingEar()))
    fails = bench.add_track(
        make_track(lambda: Job(seed=3, raises_at=1).run(modules), name="3", ear=RaisingEar())
    )
    with caplog.at_level(logging.ERROR):
        bench.run()
    assert ends.news == ["started", "finished"]
    assert fails.news == ["started", "failed"]
    assert finished_as_alone(fine, fine_job)
    assert sorted(bench.ended) == ["1", "2", "3"]
    assert "the listener of request 3 raised" in caplog.text


def test_grad_mode_of_one_pipeline_does_not_leak_to_others() -> None:
    bench = Bench()
    seen: list[bool] = []

    def curious() -> None:
        for _ in range(3):
            bench.modules.encoder(torch.zeros(1, 4))
            seen.append(torch.is_grad_enabled())

    def enabling() -> bool:
        with torch.enable_grad():
            for _ in range(3):
                bench.modules.decoder(torch.zeros(1, 4))
            return torch.is_grad_enabled()

    with torch.no_grad():
        bench.add_track(make_track(curious, name="curious"))
        ear = bench.add_track(make_track(enabling, name="enabling"))
        bench.run()
        assert not torch.is_grad_enabled()
    assert seen == [False] * 3
    assert ear.result is True
    assert bench.modules.decoder.grad_enabled == {False}


@pytest.mark.parametrize("ending", ["finished", "own python", "poisoned", "cancelled", "queued"])
def test_nothing_is_kept_of_a_request_that_ended(
    ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its track, nor its greenlet, nor the tensors in its frames; without a collection."""
    # pytest would keep the records, and their tracebacks the frames.
    caplog.set_level(logging.CRITICAL, "stepserve.engine.tracks.track")
    modules = Modules()
    ended: list[str] = []
    batcher = Batcher(clock=modules.clock, on_ended=lambda track: ended.append(track.id))
    job = Job(
        seed=1,
        raises_at=1 if ending == "own python" else None,
        poisoned_at=1 if ending == "poisoned" else None,
    )
    ear = Ear()
    kept: list[weakref.ref[Any]] = []

    def run() -> None:
        sentinel = torch.zeros(3)
        kept.append(weakref.ref(sentinel))
        kept.append(weakref.ref(greenlet.getcurrent()))
        job.run(modules)
        del sentinel

    gc.collect()
    gc.disable()
    try:
        track = replace(make_track(run, name="1", ear=ear), clock=modules.clock)
        kept.append(weakref.ref(track))
        batcher.scheduler.add(track)
        batcher.scheduler.add(
            replace(make_track(lambda: Job(seed=2).run(modules), name="2"), clock=modules.clock)
        )
        del track
        if ending == "queued":
            batcher.stop_track(RequestKey("1"), CancelledError("gone"))
        elif ending == "cancelled":
            batcher.tick()
            batcher.stop_track(RequestKey("1"), CancelledError("gone"))
        while batcher.tick():
            pass
        assert sorted(ended) == ["1", "2"]
        assert len(ear.ends) == 1
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_abandoning_a_track_answers_once() -> None:
    ear = Ear()
    track = replace(make_track(lambda: None, ear=ear), clock=FakeClock())
    track.abandon(GenerationFailedError("lost"))
    track.abandon(GenerationFailedError("again"))
    track.stop(CancelledError("late"))
    assert ear.news == ["failed"]
    assert track.state is RequestState.FAILED


def test_foreign_errors_are_told_with_the_request_and_their_kind() -> None:
    ours = CancelledError("gone")
    assert as_stepserve_error(ours, "7") is ours
    told = as_stepserve_error(ValueError("no such thing"), "7")
    assert isinstance(told, GenerationFailedError)
    assert told.message == "request 7 failed: ValueError: no such thing"
