"""Expected finish times, and who gets a request."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.requests import AdapterUse, GenerationRequest, Hires
from stepserve.domain.step_cache import StepCacheUse
from stepserve.routing.ledger import JITTER, NEWS_WITHIN_S, STEPS_AT, Ledger
from stepserve.routing.reports import (
    ALONE,
    SEPARATE,
    AdapterMixing,
    Job,
    LaterSteps,
    Report,
    StepCost,
    job_of,
)

COSTS = {"64x64": StepCost(0.02, 0.001), "128x128": StepCost(0.03, 0.008)}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def a_job(name: str = "new", steps: int = 10, rows: int = 2, size: str = "64x64") -> Job:
    return Job(name, size, size, rows, steps)


def a_ledger(*jobs: tuple[Job, ...], limit: int = 64, clock: Clock | None = None) -> Ledger:
    ledger = Ledger(clock or Clock(), seed=0)
    ledger.set_replicas(range(len(jobs)))
    for number, in_flight in enumerate(jobs):
        ledger.note_report(number, Report(in_flight, COSTS, limit))
    return ledger


def stepwise_finish_s(job: Job, in_flight: tuple[Job, ...]) -> float:
    """The definition, cycle by cycle."""
    seconds = 0.0
    for cycle in range(job.steps):
        stepping = [other for other in (*in_flight, job) if other.steps > cycle]
        seconds += sum(COSTS[other.size].row_s * other.rows for other in stepping)
        seconds += sum(COSTS[g.split()[0]].fixed_s for g in {other.group for other in stepping})
    return seconds


EXACT_STEPS = [int(steps) for steps in STEPS_AT if 0 < steps <= 128]
JOBS = st.lists(
    st.builds(
        a_job,
        name=st.uuids().map(str),
        steps=st.sampled_from(EXACT_STEPS),
        rows=st.integers(1, 8),
        size=st.sampled_from(sorted(COSTS)),
    ),
    max_size=12,
).map(tuple)


@given(JOBS, st.sampled_from(EXACT_STEPS), st.sampled_from(sorted(COSTS)), st.booleans())
def test_the_closed_form_is_what_happens_cycle_by_cycle(
    in_flight: tuple[Job, ...], steps: int, size: str, sent: bool
) -> None:
    ledger = a_ledger(() if sent else in_flight)
    for job in in_flight if sent else ():
        ledger.note_sent(0, job)
    job = a_job(steps=steps, size=size)
    assert ledger.finish_s(job)[0] == pytest.approx(stepwise_finish_s(job, in_flight))


@given(JOBS, JOBS, st.integers(1, 1000))
def test_more_in_flight_and_more_steps_never_finish_sooner(
    few: tuple[Job, ...], more: tuple[Job, ...], steps: int
) -> None:
    # Of another group: one's own may be joined.
    more = tuple(replace(job, group="other", id=f"more {job.id}") for job in more)
    finish_s = a_ledger(few, few + more).finish_s(a_job(steps=steps))
    assert finish_s[0] <= finish_s[1] + 1e-9
    assert a_ledger(few).finish_s(a_job(steps=steps + 1))[0] > finish_s[0] - 1e-9


def test_who_steps_that_size_already_is_better_than_who_steps_another() -> None:
    small, large = a_job("s", 10), a_job("l", 10, rows=1, size="128x128")
    ledger = a_ledger((small,), (large,))
    assert ledger.choose(a_job(), 1) == [0]
    assert ledger.choose(a_job(rows=1, size="128x128"), 1) == [1]


def test_adapters_are_groups_of_their_own_and_reproducible_requests_are_alone() -> None:
    request = GenerationRequest("r", "m", "p", 64, 48, 4, 4.0, 1, "s", n=3)
    one, other = AdapterUse("a", 0.5), AdapterUse("b")
    assert job_of(request, CLASSIC) == Job("/r", "64x48", "64x48", 6, 4, 3)
    groups = {
        job_of(replace(request, adapters=used), CLASSIC).group for used in ((one,), (other,), ())
    }
    assert len(groups) == 3
    assert (
        job_of(replace(request, adapters=(one, other)), CLASSIC).group
        == job_of(replace(request, adapters=(other, one)), CLASSIC).group
    )
    assert job_of(replace(request, reproducible=True), CLASSIC).group == ALONE
    assert job_of(replace(request, images=(b"x",), strength=0.5), CLASSIC).steps == 2


def test_steps_that_should_be_skipped_are_not_counted() -> None:
    request = replace(
        enlarged_request(), num_inference_steps=50, step_cache=StepCacheUse(threshold=0.1)
    )
    shares = {request.step_cache_kind: 0.45}
    assert [part.steps for part in job_of(request, CLASSIC).parts] == [50, 4]
    assert [part.steps for part in job_of(request, CLASSIC, shares).parts] == [23, 2]
    others = replace(request, scheduler="other"), replace(request, step_cache=None)
    assert [job_of(other, CLASSIC, shares).steps for other in others] == [50, 50]
    told = Report(run_shares=shares)
    assert Report.from_dict(told.to_dict()).run_shares == shares


def test_adapters_that_a_replica_mixes_are_no_groups() -> None:
    request = GenerationRequest("r", "m", "p", 64, 64, 4, 4.0, 1, "s")
    mixing = AdapterMixing(is_done=True, separate=("dora",))

    def group(*names: str, told: AdapterMixing = mixing) -> str:
        uses = tuple(AdapterUse(name, 0.5) for name in names)
        return job_of(replace(request, adapters=uses), CLASSIC, adapters=told).group

    assert group() == group("a") == group("b") == group("a", "b") == "64x64"
    assert len({group(), group("dora"), group("a", "dora")}) == 3
    assert group("a", told=SEPARATE) != group()
    reproducible = replace(request, adapters=(AdapterUse("a"),), reproducible=True)
    assert job_of(reproducible, CLASSIC, adapters=mixing).group == ALONE


def test_who_steps_requests_with_other_adapters_that_it_mixes_is_the_better_one() -> None:
    mixing = AdapterMixing(is_done=True)
    one, other = (
        GenerationRequest(n, "m", "p", 64, 64, 10, 4.0, 1, "s", adapters=(AdapterUse(n),))
        for n in ("one", "other")
    )
    for told, best in ((mixing, [0]), (SEPARATE, [1])):
        in_flight = job_of(one, CLASSIC, adapters=told)
        # Of equal cost, but for what is shared.
        cheaper = replace(in_flight, id="c", group="others", rows=1)
        ledger = a_ledger((in_flight,), (cheaper,))
        assert ledger.choose(job_of(other, CLASSIC, adapters=told), 1) == best


def enlarged_request() -> GenerationRequest:
    hires = Hires(scale=2.0, strength=0.5, num_inference_steps=8, width=128, height=128)
    return GenerationRequest("r", "m", "p", 64, 64, 6, 4.0, 1, "s", hires=hires)


def test_a_request_of_two_sizes_is_counted_at_both() -> None:
    job = job_of(enlarged_request(), CLASSIC)
    large = LaterSteps("128x128", "128x128", 4)
    assert job == Job("/r", "64x64", "64x64", 2, 6, 1, (large,))
    assert job.all_steps == 10
    ledger = a_ledger(())
    seconds = [
        (COSTS[size].fixed_s + 2 * COSTS[size].row_s) * steps
        for size, steps in (("64x64", 6), ("128x128", 4))
    ]
    assert ledger.finish_s(job)[0] == pytest.approx(sum(seconds))
    # For those behind it, as long as they take themselves.
    ledger.note_sent(0, job)
    behind = a_job("behind", 1000, size="96x96")
    serial_s = a_ledger(()).finish_s(behind)[0]
    assert ledger.finish_s(behind)[0] == pytest.approx(serial_s + sum(seconds))


def test_what_is_left_of_a_request_of_two_sizes_is_told() -> None:
    job = job_of(enlarged_request(), CLASSIC)
    assert job.left(2, [3, 4]) == replace(job, steps=3)
    refining = job.left(1, [2])
    assert refining == Job("/r", "128x128", "128x128", 1, 2, 1)
    told = Report((job, refining), COSTS)
    assert Report.from_dict(told.to_dict()) == told


def test_those_whose_rows_share_no_forward_take_their_own() -> None:
    alone = replace(a_job("a", 12), group=ALONE)
    ledger = a_ledger((alone,))
    assert ledger.finish_s(alone)[0] == pytest.approx(2 * stepwise_finish_s(a_job("a", 12), ()))


def test_the_slow_replica_gets_less() -> None:
    ledger = a_ledger((), ())
    slow = {size: StepCost(cost.fixed_s * 4, cost.row_s * 4) for size, cost in COSTS.items()}
    ledger.note_report(1, Report((), slow))
    taken = [0, 0]
    for number in range(40):
        job = a_job(str(number))
        chosen = ledger.choose(job, 1)[0]
        ledger.note_sent(chosen, job)
        taken[int(str(chosen))] += 1
    assert taken[0] > 2 * taken[1] > 0


def test_what_is_in_flight_melts_and_reports_are_believed() -> None:
    clock = Clock()
    ledger = a_ledger((), clock=clock)
    idle_s = ledger.finish_s(a_job())[0]
    ledger.note_sent(0, a_job("other", 100))
    busy_s = ledger.finish_s(a_job())[0]
    clock.now_s += 1.1
    half_s = ledger.finish_s(a_job())[0]
    clock.now_s += 1.5
    assert busy_s > half_s > ledger.finish_s(a_job())[0] - 1e-9
    ledger.note_report(0, Report((), COSTS))
    assert ledger.finish_s(a_job())[0] == pytest.approx(idle_s)


def test_who_is_silent_with_work_in_flight_is_asked_less_and_less() -> None:
    clock = Clock()
    ledger = a_ledger((a_job("a", 100),), (a_job("b", 100), a_job("c", 100)), clock=clock)
    before_s = ledger.finish_s(a_job())
    assert before_s[0] < before_s[1]
    for left in range(99, 89, -1):
        clock.now_s += 1.0
        ledger.note_report(0, Report((a_job("a", 100),), COSTS))
        ledger.note_report(1, Report((a_job("b", left), a_job("c", left)), COSTS))
    silent_s = 10.0 - NEWS_WITHIN_S
    assert ledger.finish_s(a_job()) == pytest.approx(before_s + np.array([silent_s, 0.0]))
    # What is known of it stays when others come.
    ledger.set_replicas([1, 0])
    assert ledger.finish_s(a_job()) == pytest.approx((before_s + np.array([silent_s, 0.0]))[::-1])
    ledger.note_report(0, Report((a_job("a", 99),), COSTS))
    assert ledger.finish_s(a_job()) == pytest.approx(before_s[::-1])


def test_who_has_nothing_to_do_has_nothing_to_show() -> None:
    clock = Clock()
    ledger = a_ledger((), clock=clock)
    idle_s = ledger.finish_s(a_job())[0]
    clock.now_s += 1000
    assert ledger.finish_s(a_job())[0] == idle_s
    ledger.note_sent(0, a_job("sent", 1))
    clock.now_s += 2
    assert ledger.finish_s(a_job())[0] <= idle_s
    clock.now_s += 1000
    assert ledger.finish_s(a_job())[0] > 999
    ledger.note_ended(0, "sent")
    assert ledger.finish_s(a_job())[0] == pytest.approx(idle_s)


def test_a_report_that_was_under_way_forgets_nothing_new_and_revives_nothing_old() -> None:
    clock = Clock()
    ledger = a_ledger((), clock=clock)
    idle_s = ledger.finish_s(a_job())[0]
    ledger.note_sent(0, a_job("sent", 100))
    clock.now_s += 0.1
    ledger.note_report(0, Report((), COSTS))
    assert ledger.finish_s(a_job())[0] > idle_s
    ledger.note_ended(0, "sent")
    ledger.note_report(0, Report((a_job("sent", 5),), COSTS))
    assert ledger.finish_s(a_job())[0] == pytest.approx(idle_s)


def test_who_is_full_comes_last_and_among_the_full_the_soonest_comes_first() -> None:
    many = tuple(a_job(str(i), 2, rows=1) for i in range(4))
    long = (a_job("long", 100, rows=8),)
    assert a_ledger(many, long, limit=4).choose(a_job(), 2) == [1, 0]
    longer = (*long, *(a_job(f"x{i}", 100) for i in range(3)))
    assert a_ledger(longer, many, limit=4).choose(a_job(), 2) == [1, 0]
    # An empty one takes what is larger than its limit.
    assert a_ledger((), many, limit=4).choose(replace(a_job(), images=8), 1) == [0]


def test_what_is_known_of_those_that_stay_is_kept() -> None:
    ledger = a_ledger((a_job("a", 50),), (), ())
    before = ledger.finish_s(a_job())
    ledger.set_replicas([2, 0])
    assert ledger.finish_s(a_job()) == pytest.approx([before[2], before[0]])
    ledger.note_sent(1, a_job("gone"))
    ledger.note_report(1, Report((a_job("gone"),), COSTS))
    ledger.note_ended(1, "gone")
    assert ledger.finish_s(a_job()) == pytest.approx([before[2], before[0]])
    ledger.set_replicas([])
    assert ledger.choose(a_job(), 3) == []


def test_routers_that_know_the_same_do_not_all_choose_the_same() -> None:
    chosen = set()
    for seed in range(20):
        ledger = Ledger(Clock(), seed=seed)
        ledger.set_replicas(range(8))
        chosen.add(ledger.choose(a_job(), 1)[0])
    assert len(chosen) > 3
    assert 0 < JITTER < 1


def test_reports_travel_as_plain_values() -> None:
    report = Report((a_job(),), COSTS, 12, adapters=AdapterMixing(True, ("dora",)))
    assert Report.from_dict(report.to_dict()) == report


def test_a_decision_among_a_thousand_replicas_takes_less_than_100_microseconds() -> None:
    chance = np.random.default_rng(0)
    sizes = [sorted(COSTS)[int(i)] for i in chance.integers(0, 2, 20_000)]
    jobs = [
        a_job(f"j{i}", int(s), 2, sizes[i]) for i, s in enumerate(chance.integers(1, 99, 20_000))
    ]
    ledger = Ledger(time.monotonic, seed=0)
    ledger.set_replicas(range(1000))
    for number in range(1000):
        ledger.note_report(number, Report(tuple(jobs[20 * number :][:20]), COSTS))
    newcomers = [a_job(f"n{i}", 4 + i % 90, 2, sizes[i]) for i in range(1500)]
    took_s = []
    for job in newcomers:
        began_s = time.perf_counter()
        chosen = ledger.choose(job, 3)
        ledger.note_sent(chosen[0], job)
        took_s.append(time.perf_counter() - began_s)
    assert np.median(took_s) < 100e-6


def test_one_id_of_two_owners_is_two_jobs() -> None:
    request = GenerationRequest("order", "emoji", "cat", 64, 64, 20, 4.0, 0, "ddim", owner="a")
    ledger = a_ledger(())
    alice, bob = (job_of(replace(request, owner=name), CLASSIC) for name in "ab")
    ledger.note_sent(0, alice)
    ledger.note_sent(0, bob)
    ledger.note_ended(0, alice.id)

    assert not ledger.has_in_flight(0, alice.id)
    assert ledger.has_in_flight(0, bob.id)
