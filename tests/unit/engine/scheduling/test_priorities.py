"""Who goes first, who steps back, and who comes too late."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_fakes import Bench, Ear, Job, alone, job_track
from stepserve.domain.errors import ExpiredError
from stepserve.domain.requests import Priority
from stepserve.domain.states import RequestState

from loadtests.policies import STRICT_FIFO


def add(bench: Bench, job: Job, priority: int = 1, deadline_s: float | None = None) -> Ear:
    track = job_track(bench.modules, job)
    return bench.add_track(replace(track, priority=priority, deadline_s=deadline_s))


def assert_same(ear: Ear, job: Job) -> None:
    assert ear.ends == ["finished"]
    assert torch.equal(ear.result, alone(job))


def steps_done(bench: Bench) -> dict[str, int]:
    return {track.id: track.steps_done for track in bench.batcher.scheduler.running}


def test_a_preempted_job_stands_still_and_goes_on_where_it_stood() -> None:
    """Four rows fit. A long batch job has them, an interactive one takes them, then it goes on."""
    bench = Bench(max_rows=4)
    long, short = Job(seed=1, steps=20, rows=4), Job(seed=2, steps=6, rows=4)
    long_ear = add(bench, long, Priority.BATCH)
    bench.run(6)
    stood = steps_done(bench)["1"]
    short_ear = add(bench, short, Priority.INTERACTIVE)
    while not short_ear.ends:
        bench.run(1)
        assert steps_done(bench)["1"] == stood
    assert long_ear.ends == []
    bench.run()
    assert_same(short_ear, short)
    assert_same(long_ear, long)
    assert bench.modules.denoiser.rows == [4] * 26


def stream_of_urgent_ones(bench: Bench, until: Ear) -> int:
    """One more as often as one can be served; returns how many came before `until` ended."""
    for seed in range(200):
        add(bench, Job(seed=seed, steps=2, rows=4), Priority.INTERACTIVE)
        bench.run(4)
        if until.ends:
            return seed
    raise AssertionError("starved")


def test_a_preempted_job_is_not_starved_by_a_stream_of_urgent_ones() -> None:
    """It is passed over for `HOLD` times eight times its own forward, and then has a turn."""
    bench = Bench(max_rows=4)
    batch = Job(seed=999, steps=4, rows=4)
    ear = add(bench, batch, Priority.BATCH)
    bench.run(2)
    assert 10 < stream_of_urgent_ones(bench, until=ear) < 120
    assert_same(ear, batch)


def test_a_queued_request_is_not_starved_by_urgent_ones_either() -> None:
    bench = Bench(max_rows=4)
    add(bench, Job(seed=500, steps=2, rows=4), Priority.INTERACTIVE)
    bench.run(1)
    batch = Job(seed=999, steps=4, rows=4)
    ear = add(bench, batch, Priority.BATCH)
    assert 10 < stream_of_urgent_ones(bench, until=ear) < 160
    assert_same(ear, batch)


def test_the_urgent_are_started_first() -> None:
    bench = Bench(max_rows=2)
    for seed, priority in enumerate([1, 2, 1, 0]):
        add(bench, Job(seed=seed), priority)
    bench.run()
    assert bench.ended == ["3", "0", "2", "1"]


def test_an_urgent_request_is_not_blocked_by_a_long_old_queue() -> None:
    bench = Bench(max_rows=4)
    ears = [add(bench, Job(seed=seed, steps=30)) for seed in range(20)]
    bench.run(200)
    assert any(not ear.news for ear in ears)
    urgent = Job(seed=99, steps=4)
    ear = add(bench, urgent, Priority.INTERACTIVE)
    # Encoder, steps and decoder, with a few turns of those that are older.
    bench.run(12)
    assert_same(ear, urgent)
    bench.run()
    assert all(other.ends == ["finished"] for other in ears)


def test_normal_requests_do_not_step_back_for_their_equals() -> None:
    bench = Bench(max_rows=2)
    first = add(bench, Job(seed=1, steps=9))
    bench.run(4)
    second = add(bench, Job(seed=2, steps=3))
    bench.run(1)
    assert second.news == []
    bench.run()
    assert first.ends == second.ends == ["finished"]
    assert bench.ended == ["1", "2"]


def test_a_deadline_that_presses_is_started_first() -> None:
    bench = Bench(max_rows=2)
    add(bench, Job(seed=9))
    bench.run()
    add(bench, Job(seed=1, steps=10))
    add(bench, Job(seed=2, steps=10), deadline_s=0.5)
    bench.run()
    assert bench.ended == ["9", "2", "1"]


def test_short_requests_are_started_before_long_ones_of_the_same_age() -> None:
    bench = Bench(max_rows=2)
    for seed, steps in ((1, 50), (2, 4), (3, 10)):
        add(bench, Job(seed=seed, steps=steps))
    bench.run()
    assert bench.ended == ["2", "3", "1"]


def test_strict_fifo_keeps_the_order_of_submission() -> None:
    bench = Bench(max_rows=2, policy=STRICT_FIFO)
    for seed, steps in ((1, 50), (2, 4), (3, 10)):
        add(bench, Job(seed=seed, steps=steps), priority=3 - seed)
    bench.run()
    assert bench.ended == ["1", "2", "3"]


def test_an_expired_request_ends_wherever_it_is() -> None:
    """One is parked when its deadline passes, one is queued; a third then has their room."""
    bench = Bench(max_rows=2)
    parked = add(bench, Job(seed=1, steps=1000), deadline_s=0.5)
    bench.run(2)
    queued = add(bench, Job(seed=2, steps=1000), deadline_s=0.4)
    later = add(bench, Job(seed=3, steps=2))
    tracks = list(bench.batcher.scheduler.tracks)
    while not parked.ends:
        assert later.news == []
        bench.run(1)
    # The rows were free for the very tick in which it was dropped.
    assert later.news == ["started"]
    assert bench.clock.now_s < 100.6
    for ear, name in ((parked, "1"), (queued, "2")):
        assert ear.ends == ["failed"]
        assert isinstance(ear.error, ExpiredError)
        assert f"request {name} was not finished within its deadline" in str(ear.error)
    assert [track.state for track in tracks[:2]] == [RequestState.EXPIRED] * 2
    bench.run()
    assert later.ends == ["finished"]


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_pipeline_cannot_talk_its_way_out_of_its_deadline(caught: type[BaseException]) -> None:
    bench = Bench()

    def run() -> None:
        for _ in range(100):
            try:
                bench.modules.decoder(torch.zeros(1, 4))
            except caught:
                continue

    track = job_track(bench.modules, Job(seed=1))
    track = replace(track, run=run, deadline_s=0.1, clock=bench.clock)
    bench.batcher.scheduler.add(track)
    bench.run()
    assert track.state is RequestState.EXPIRED


def test_what_is_finished_in_time_is_not_expired() -> None:
    bench = Bench()
    ear = add(bench, Job(seed=1), deadline_s=10)
    bench.run()
    bench.clock.advance(100)
    bench.batcher.tick()
    assert ear.news == ["started", "finished"]


def test_isolated_requests_never_share() -> None:
    bench = Bench()
    isolated = Job(seed=2, steps=4)
    track = replace(job_track(bench.modules, isolated), isolated=True)
    others = [bench.add(Job(seed=seed, steps=4)) for seed in (1, 3)]
    ear = bench.add_track(track)
    bench.run()
    assert_same(ear, isolated)
    assert all(other.ends == ["finished"] for other in others)
    assert sorted(bench.modules.denoiser.rows) == [2] * 4 + [4] * 4
