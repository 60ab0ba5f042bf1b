"""What goes wrong with a shared forward, with memory or in a pipeline, and who survives it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import greenlet
import pytest
import torch
from engine_fakes import Bench, Ear, Job, alone, make_parkable, make_track, tensor_call
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.errors import CancelledError, StoppedError
from stepserve.domain.requests import RequestKey
from stepserve.engine.calls.call import ParkableMethod
from stepserve.engine.device_errors import is_device_lost, is_out_of_memory
from stepserve.engine.scheduling.row_limits import (
    RECOVERY_FORWARDS,
    STRIKES,
    RowLimits,
    knee,
)

from loadtests.policies import DUE_TIME

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_told_by_type_or_text(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


class Fragile:
    """A module of which tests say what it cannot do."""

    def __init__(
        self, fails: Callable[[int], BaseException | None], bucket_rows: tuple[int, ...] = ()
    ) -> None:
        self.fails = fails
        self.rows: list[int] = []
        # All go on together, as far as rows fit.
        self.bench = Bench(policy=DUE_TIME)
        self.module = torch.nn.Module()
        self.module.forward = self.forward
        make_parkable(self.module, "fragile", "forward", stage="denoise", bucket_rows=bucket_rows)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.rows.append(sample.shape[0])
        if error := self.fails(sample.shape[0]):
            raise error
        return sample + 1

    def add(self, seed: int, steps: int) -> Ear:
        def run() -> torch.Tensor:
            sample = torch.full((2, 3), float(seed))
            for _ in range(steps):
                sample = self.module.forward(sample)
            return sample

        return self.bench.add_track(make_track(run, name=str(seed), steps=steps))

    def run_many(self, count: int, steps: int) -> None:
        ears = [self.add(seed, steps) for seed in range(count)]
        self.bench.run()
        for seed, ear in enumerate(ears):
            assert ear.ends == ["finished"]
            assert torch.equal(ear.result, torch.full((2, 3), float(seed + steps)))


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_limit_finishes_everyone_and_recovers(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    scarce = True
    fragile = Fragile(lambda rows: error if scarce and rows > 9 else None)
    with caplog.at_level(logging.WARNING):
        fragile.run_many(8, steps=4)
        assert fragile.rows == [16] + [8] * 8
        counters = fragile.bench.batcher.counters
        assert (counters.retries, counters.out_of_memory, counters.unstacked) == (1, 1, 0)
        scarce = False
        fragile.rows.clear()
        fragile.run_many(8, steps=40)
    assert fragile.rows[:56] == [8] * 56
    assert fragile.rows[-1] == 16
    assert counters.retries == 1
    assert caplog.text.count("at most 8 rows from now on") == 1


def test_memory_that_stays_scarce_is_tried_ever_more_rarely() -> None:
    fragile = Fragile(lambda rows: MemoryError() if rows > 9 else None)
    fragile.run_many(8, steps=1200)
    tries = [index for index, rows in enumerate(fragile.rows) if rows == 16]
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 8 * gaps[0]
    assert fragile.bench.batcher.counters.out_of_memory == len(tries)


def test_a_call_that_takes_too_much_memory_alone_fails_alone() -> None:
    fragile = Fragile(lambda rows: None)

    def greedy() -> None:
        fragile.module.forward(torch.zeros(99, 3))

    fragile.fails = lambda rows: MemoryError("no") if rows > 9 else None
    ear = fragile.bench.add_track(make_track(greedy, name="greedy", rows=99))
    fragile.run_many(3, steps=3)
    assert isinstance(ear.error, MemoryError)


def test_a_shape_that_cannot_be_stacked_is_soon_left_alone_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fragile = Fragile(lambda rows: ValueError("two rows, please") if rows > 2 else None)
    with caplog.at_level(logging.WARNING):
        fragile.run_many(2, steps=10 * RECOVERY_FORWARDS)
    counters = fragile.bench.batcher.counters
    assert (counters.retries, counters.out_of_memory, counters.unstacked) == (STRIKES, 0, 1)
    assert fragile.rows.count(4) == STRIKES
    assert caplog.text.count("stays for good") == 1


def test_one_failure_in_passing_is_forgiven() -> None:
    failures = [RuntimeError("a hiccup")]
    fragile = Fragile(lambda rows: failures.pop() if failures and rows > 9 else None)
    fragile.run_many(8, steps=100)
    counters = fragile.bench.batcher.counters
    assert (counters.retries, counters.unstacked) == (1, 0)
    assert fragile.rows[-1] == 16
    assert not fragile.bench.batcher.executor.row_limits._lowered


def test_shapes_are_limited_apart() -> None:
    limits = RowLimits()
    small, large = (tensor_call(torch.zeros(2, width)) for width in (3, 4))
    limits.halve(small, 16, MemoryError())
    assert (limits.limit(small), limits.limit(large)) == (8, 32)


def test_a_measured_limit_is_for_denoising_only() -> None:
    limits = RowLimits(denoiser_rows=4)
    decode = ParkableMethod("vae", "decode", lambda: None, stage="decode", max_rows=9)
    assert limits.limit(tensor_call(torch.zeros(1, 3))) == 4
    assert limits.limit(tensor_call(torch.zeros(1, 3), rule=decode)) == 9


@pytest.mark.parametrize(
    ("curve", "rows"),
    [
        ({2: 0.017, 8: 0.040, 16: 0.054, 32: 0.104}, 32),
        ({2: 0.017, 8: 0.040, 16: 0.054, 32: 0.107}, 16),
        ({2: 0.017, 8: 0.040}, 8),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({2: 1.0, 4: 1.1, 8: 3.0, 64: 100.0}, 4),
        ({2: 0.0, 4: 1.0}, 4),
    ],
)
def test_the_knee_of_a_measured_curve(curve: dict[int, float], rows: int) -> None:
    assert knee(curve) == rows


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10), min_size=1))
def test_the_knee_is_a_measured_row_count_near_the_best(curve: dict[int, float]) -> None:
    best = max(rows / seconds for rows, seconds in curve.items())
    chosen = knee(curve)
    assert chosen / curve[chosen] >= 0.97 * best
    assert all(rows / s < 0.97 * best for rows, s in curve.items() if rows < chosen)


def test_nothing_measured_has_no_knee() -> None:
    with pytest.raises(ValueError, match="no forward was measured"):
        knee({})


def parks_of(job: Job) -> int:
    """How often a job is parked: encoder, each step, decoder."""
    return job.steps + 2


@pytest.mark.parametrize("park", range(parks_of(Job(seed=7, steps=6))))
def test_a_cancel_at_every_park_leaves_no_trace(
    park: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "stepserve.engine.tracks.track")
    bench = Bench()
    victim, others = Job(seed=7, steps=6), [Job(seed=8, steps=3), Job(seed=9, steps=9)]
    kept: list[weakref.ref[Any]] = []

    def run() -> None:
        tensor = torch.zeros(3)
        kept.extend((weakref.ref(tensor), weakref.ref(greenlet.getcurrent())))
        victim.run(bench.modules)
        del tensor

    ears = [bench.add(job) for job in others]
    ear = bench.add_track(make_track(run, name="7", rows=victim.rows, steps=victim.steps))
    gc.collect()
    gc.disable()
    try:
        bench.run(park)
        bench.batcher._start_queued()
        (track,) = (track for track in bench.batcher.scheduler.running if track.id == "7")
        assert track.call is not None
        del track
        bench.batcher.stop_track(RequestKey("7"), CancelledError("gone"))
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
    bench.run()
    assert isinstance(ear.error, CancelledError)
    for other, job in zip(ears, others, strict=True):
        assert torch.equal(other.result, alone(job))


class Broken(Ear):
    """A listener whose every callback raises."""

    def started(self) -> None:
        super().started()
        raise LookupError("started")

    def finished(self, result: Any, timings: Any) -> None:
        super().finished(result, timings)
        raise LookupError("finished")

    def failed(self, error: BaseException, timings: Any) -> None:
        super().failed(error, timings)
        raise LookupError("failed")


@pytest.mark.parametrize("ending", ["finished", "raises", "poisoned", "cancelled"])
def test_callbacks_that_raise_harm_nobody(ending: str) -> None:
    bench = Bench()
    job = Job(
        seed=1,
        raises_at=1 if ending == "raises" else None,
        poisoned_at=1 if ending == "poisoned" else None,
    )
    neighbour = Job(seed=2)
    other = bench.add(neighbour)
    ear = bench.add_track(make_track(lambda: job.run(bench.modules), name="1", ear=Broken()))
    bench.run(2)
    if ending == "cancelled":
        bench.batcher.stop_track(RequestKey("1"), CancelledError("gone"))
    bench.run()
    assert len(ear.ends) == 1
    assert torch.equal(other.result, alone(neighbour))


def test_rows_that_only_fill_up_are_the_first_to_go_when_memory_is_scarce() -> None:
    fragile = Fragile(lambda rows: MemoryError() if rows > 4 else None, bucket_rows=(8,))
    fragile.run_many(3, steps=3)
    # Six rows filled up, six as they are, then halves; from then on what was seen to fit.
    assert fragile.rows[:4] == [8, 6, 2, 4]
    assert max(fragile.rows[4:]) <= 4
    counters = fragile.bench.batcher.counters
    assert (counters.retries, counters.out_of_memory) == (2, 2)


def test_a_call_of_its_own_is_not_filled_up_beyond_what_memory_takes() -> None:
    fragile = Fragile(lambda rows: MemoryError() if rows > 2 else None, bucket_rows=(8,))
    fragile.run_many(1, steps=4)
    assert fragile.rows == [8, 2, 2, 2, 2]
    assert fragile.bench.batcher.counters.out_of_memory == 1


def test_memory_that_runs_out_for_a_single_call_is_counted_and_lowers_no_limit() -> None:
    fragile = Fragile(lambda rows: MemoryError() if rows < 3 else None)
    ear = fragile.add(0, steps=1)
    fragile.bench.run()
    assert isinstance(ear.error, MemoryError)
    assert fragile.bench.batcher.counters.out_of_memory == 1
    fragile.fails = lambda rows: None
    fragile.run_many(8, steps=1)
    assert fragile.rows[-1] == 16


def test_on_a_lost_device_all_are_told_that_another_may_serve_them() -> None:
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    fragile = Fragile(lambda rows: lost)
    ears = [fragile.add(seed, steps=2) for seed in range(3)]
    fragile.bench.run()
    assert [type(ear.error) for ear in ears] == [StoppedError] * 3
    # Nothing was tried again in halves.
    assert fragile.rows == [6]
    assert fragile.bench.batcher.executor.device_lost


@pytest.mark.parametrize(
    "error", [ValueError("x"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_other_errors_lose_no_device(error: Exception) -> None:
    assert not is_device_lost(error)
