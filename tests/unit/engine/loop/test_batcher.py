from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_fakes import Bench, Ear, Job, alone, job_track, make_track
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.errors import CancelledError
from stepserve.domain.requests import RequestKey
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.loop.execution import Execution


def assert_same(ear: Ear, job: Job) -> None:
    assert ear.ends == ["finished"]
    assert torch.equal(ear.result, alone(job))


def test_requests_of_different_lengths_share_every_step_they_can() -> None:
    """Steps 2, 3, 4 and 5: fourteen calls, and five forwards are the least possible."""
    bench = Bench()
    jobs = [Job(seed=steps, steps=steps) for steps in (2, 3, 4, 5)]
    ears = [bench.add(job) for job in jobs]
    bench.run()
    for ear, job in zip(ears, jobs, strict=True):
        assert_same(ear, job)
    assert bench.modules.encoder.rows == [8]
    assert bench.modules.denoiser.rows == [8, 8, 6, 4, 2]


@given(
    jobs=st.lists(
        st.builds(Job, seed=st.integers(0, 99), steps=st.integers(1, 6), rows=st.integers(1, 4)),
        min_size=1,
        max_size=8,
    ),
    ticks=st.lists(st.integers(0, 4), min_size=8, max_size=8),
)
def test_joining_at_any_step_changes_no_image(jobs: list[Job], ticks: list[int]) -> None:
    bench = Bench(max_rows=12)
    ears = []
    for job, wait in zip(jobs, ticks, strict=False):
        bench.run(wait)
        ears.append(bench.add(job))
    bench.run()
    for ear, job in zip(ears, jobs, strict=True):
        assert_same(ear, job)
    counters = bench.batcher.counters
    assert counters.retries == 0
    assert counters.calls == sum(job.steps + 2 for job in jobs)
    assert counters.rows == sum((job.steps + 2) * job.rows for job in jobs)
    assert counters.forward_s <= counters.busy_s + 1e-9


def test_a_newcomer_joins_the_very_next_step() -> None:
    bench = Bench()
    bench.add(Job(seed=1, steps=50))
    bench.run(10)
    steps = len(bench.modules.denoiser.rows)
    newcomer = bench.add(Job(seed=2, steps=2))
    while len(bench.modules.denoiser.rows) == steps:
        bench.run(1)
    assert bench.modules.denoiser.rows[-1] == 4
    bench.run()
    assert newcomer.ends == ["finished"]


def test_cancelling_at_every_park_leaves_the_others_alone() -> None:
    victim, others = Job(seed=7, steps=4), [Job(seed=8, steps=3), Job(seed=9, steps=6)]
    for ticks in range(12):
        bench = Bench()
        victim_ear, *ears = [bench.add(job) for job in (victim, *others)]
        bench.run(ticks)
        ended_before = bool(victim_ear.ends)
        bench.batcher.stop_track(RequestKey("7"), CancelledError("gone"))
        bench.run()
        assert victim_ear.ends == (["finished"] if ended_before else ["failed"])
        assert ended_before or isinstance(victim_ear.error, CancelledError)
        for ear, job in zip(ears, others, strict=True):
            assert_same(ear, job)
        assert sorted(bench.ended) == ["7", "8", "9"]
        assert not bench.batcher.scheduler.running
        assert not bench.batcher.scheduler.queued


def test_cancelling_unknown_or_ended_requests_does_nothing() -> None:
    bench = Bench()
    ear = bench.add(Job(seed=1))
    bench.run()
    bench.batcher.stop_track(RequestKey("1"), CancelledError("late"))
    bench.batcher.stop_track(RequestKey("nobody"), CancelledError("who"))
    assert ear.news == ["started", "finished"]
    assert bench.ended == ["1"]


def test_cancelling_a_queued_request_never_starts_it() -> None:
    bench = Bench()
    ear = bench.add(Job(seed=1))
    bench.batcher.stop_track(RequestKey("1"), CancelledError("gone"))
    assert ear.news == ["failed"]
    assert not bench.batcher.tick()
    assert ear.timings is not None
    assert ear.timings.queue_s == ear.timings.total_s


def test_active_rows_stay_within_the_limit_and_later_ones_wait_in_order() -> None:
    bench = Bench(max_rows=4)
    jobs = [Job(seed=seed, rows=2, steps=3) for seed in range(5)]
    ears = [bench.add(job) for job in jobs]
    most = 0
    while bench.batcher.tick():
        most = max(most, sum(track.rows for track in bench.batcher.scheduler.running))
    assert most == 4
    assert bench.ended == ["0", "1", "2", "3", "4"]
    for ear, job in zip(ears, jobs, strict=True):
        assert_same(ear, job)


def test_other_sizes_start_where_their_own_forwards_have_room() -> None:
    bench = Bench(max_rows=4)
    for seed in range(3):
        bench.add(Job(seed=seed, rows=2, steps=30))
    other = Job(seed=9, rows=2, steps=3)
    # In the fakes a set of adapters is what keeps calls apart, as a size does.
    bench.add_track(replace(job_track(bench.modules, other), variant="other"))
    bench.run(1)
    assert {track.id for track in bench.batcher.scheduler.running} == {"0", "1", "9"}
    bench.run()
    assert bench.ended == ["9", "0", "1", "2"]


def test_rows_that_are_needed_no_more_let_others_start() -> None:
    """Guidance at two of six steps: from the third on there is room for two more rows."""
    bench = Bench(max_rows=4)
    interval = GuidanceInterval(4, calls=6, needs_all=lambda call: call < 2)
    wide = replace(
        job_track(bench.modules, Job(seed=1, rows=4, steps=6)), guidance_interval=interval
    )
    bench.add_track(wide)
    bench.run(1)
    newcomer = bench.add(Job(seed=2, rows=2, steps=4))
    bench.run()
    assert bench.modules.denoiser.rows == [4, 4, 4, 4, 4, 4]
    assert_same(newcomer, Job(seed=2, rows=2, steps=4))


def test_a_request_larger_than_the_limit_runs_alone_and_blocks_nobody_for_good() -> None:
    bench = Bench(max_rows=4)
    jobs = [Job(seed=1, rows=2), Job(seed=2, rows=9), Job(seed=3, rows=2)]
    ears = [bench.add(job) for job in jobs[:2]]
    bench.run(1)
    bench.clock.advance(1.0)
    ears.append(bench.add(jobs[2]))
    bench.run()
    assert bench.ended == ["1", "2", "3"]
    assert bench.modules.denoiser.rows == [2, 2, 2, 9, 9, 9, 2, 2, 2]
    for ear, job in zip(ears, jobs, strict=True):
        assert_same(ear, job)


def test_the_queue_goes_on_in_the_same_tick_when_the_first_in_line_ends_at_once() -> None:
    """Else the engine would think that there is nothing to do, and rest."""
    bench = Bench(max_rows=4)

    def fails() -> None:
        raise ValueError("no")

    failing = bench.add_track(make_track(fails, name="failing", rows=4))
    fine = bench.add(Job(seed=1, rows=4))
    assert bench.batcher.tick()
    assert failing.ends == ["failed"]
    assert fine.news == ["started"]
    assert bench.modules.encoder.rows == [4]


def test_a_tick_that_only_started_something_is_not_idle() -> None:
    bench = Bench()
    ear = bench.add_track(make_track(lambda: "no module needed"))
    assert bench.batcher.tick()
    assert ear.result == "no module needed"
    assert not bench.batcher.tick()


def backlog_s(bench: Bench) -> float:
    return max(bench.finish_times_s(), default=0)


def test_backlog_shrinks_to_nothing() -> None:
    bench = Bench()
    for seed in range(3):
        bench.add(Job(seed=seed, steps=5))
    seen = [backlog_s(bench)]
    while bench.batcher.tick():
        seen.append(backlog_s(bench))
    assert seen[0] > 0
    assert seen[-1] == 0
    # The first estimate is a guess; once steps are measured it only falls.
    assert seen[2:] == sorted(seen[2:], reverse=True)


def test_timings_tell_where_the_time_went() -> None:
    """All costs are the fake clock's: encoder 2 + 0.1 a row, denoiser 40 + 2, decoder 5 + 1 ms."""
    bench = Bench()
    alone_ear = bench.add(Job(seed=1, steps=2, rows=2))
    bench.run()
    timings = alone_ear.timings
    assert timings is not None
    assert timings.queue_s == 0
    assert timings.encode_s == pytest.approx(0.0022)
    assert timings.first_step_s == pytest.approx(0.0022)
    assert timings.denoise_s == pytest.approx(2 * 0.044)
    assert timings.decode_s == pytest.approx(0.007)
    assert timings.total_s == pytest.approx(0.0022 + 0.088 + 0.007)
    assert timings.batch_share == 1


def test_own_python_counts_towards_the_total() -> None:
    bench = Bench()
    clock = bench.clock

    def run() -> None:
        clock.advance(1)
        bench.modules.decoder(torch.zeros(1, 4))
        clock.advance(2)

    ear = bench.add_track(make_track(run))
    bench.run()
    assert ear.timings is not None
    assert ear.timings.total_s == pytest.approx(3 + 0.006)


def test_shares_are_the_rows_that_were_ones_own() -> None:
    bench = Bench()
    small = bench.add(Job(seed=1, steps=2, rows=1))
    large = bench.add(Job(seed=2, steps=4, rows=3))
    bench.run()
    assert small.timings is not None
    assert large.timings is not None
    assert small.timings.batch_share == pytest.approx(1 / 4)
    assert large.timings.batch_share == pytest.approx((3 / 4 + 3 / 4 + 1 + 1) / 4)


def test_waiting_in_line_is_queue_time() -> None:
    bench = Bench(max_rows=2)
    first = bench.add(Job(seed=1))
    second = bench.add(Job(seed=2))
    bench.run()
    assert first.timings is not None
    assert second.timings is not None
    assert second.timings.queue_s == pytest.approx(first.timings.total_s)


def test_until_rows_are_measured_the_ceiling_is_the_limit() -> None:
    assert EngineOptions().max_rows is None
    assert EngineOptions().row_ceiling == 64
    assert EngineOptions(max_rows=3).row_ceiling == 3


def test_one_at_a_time_nobody_starts_before_the_one_at_work_has_ended() -> None:
    bench = Bench(execution=Execution(one_at_a_time=True))
    ears = [bench.add(Job(seed)) for seed in range(3)]
    most = 0
    while bench.batcher.tick():
        most = max(most, len(bench.batcher.scheduler.running))
    assert most == 1
    assert bench.ended == ["0", "1", "2"]
    for seed, ear in enumerate(ears):
        assert torch.equal(ear.result, alone(Job(seed)))
    assert set(bench.modules.denoiser.rows) == {2}


def test_forwards_are_filled_up_to_buckets_and_the_rest_belongs_to_nobody() -> None:
    bench = Bench(bucket_rows=(4, 8))
    ears = [bench.add(Job(seed)) for seed in range(3)]
    bench.run()
    assert set(bench.modules.denoiser.rows) == {8}
    for seed, ear in enumerate(ears):
        assert torch.equal(ear.result, alone(Job(seed)))
    assert bench.batcher.counters.padded_rows == 3 * 2 + 2 * 2


def test_of_two_owners_with_one_id_the_right_one_is_ended() -> None:
    bench = Bench()
    jobs = {"alice": Job(seed=7, steps=4), "bob": Job(seed=8, steps=4)}
    ears = {
        owner: bench.add_track(replace(job_track(bench.modules, job), id="order", owner=owner))
        for owner, job in jobs.items()
    }
    bench.run(2)
    bench.batcher.stop_track(RequestKey("order", "bob"), CancelledError("gone"))
    bench.run()

    assert ears["bob"].ends == ["failed"]
    assert_same(ears["alice"], jobs["alice"])


def test_isolated_requests_of_two_owners_with_one_id_share_nothing() -> None:
    bench = Bench()
    for owner in ("alice", "bob"):
        track = job_track(bench.modules, Job(seed=1, steps=4))
        bench.add_track(replace(track, id="order", owner=owner, isolated=True))
    bench.run()

    assert bench.modules.denoiser.rows == [2] * 8
