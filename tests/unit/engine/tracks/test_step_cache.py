"""Steps that are skipped, in a batcher on a fake clock, against the rule written down once more."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engine_fakes import Bench, FakeClock, Job, alone
from hypothesis import given, settings
from hypothesis import strategies as st
from skipping_requests import Control, Drawing, Site
from stepserve.domain.errors import CancelledError, ExpiredError
from stepserve.domain.states import RequestState
from torch import Tensor

FIRST = 3


@dataclass
class Plain:
    """The rule by itself: what a loop without any engine does with a drawing."""

    drawing: Drawing
    inputs: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[Any, list[tuple[float, Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    error: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    calls: int = 0
    ran: list[int] = field(default_factory=list)
    skips: bool = False

    def run(self) -> Tensor:
        modules, control = Bench().modules, Control(FakeClock(), 0, 0)
        self.denoiser = modules.denoiser
        return self.drawing.run(self._denoise, control)

    def _denoise(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        step, lane = divmod(self.calls, self.drawing.calls_per_step)
        stage = step % self.drawing.order
        self.calls += 1
        if lane == 0:
            self.skips = self._decide(step, stage, sample)
        known = self.outputs[stage, lane]
        if self.skips:
            (before_t, before), (latest_t, latest) = known[-2:]
            return latest + (latest - before) * (
                (float(timestep) - latest_t) / (latest_t - before_t)
            )
        output: Tensor = self.denoiser(sample, timestep, text=text)[0]
        known.append((float(timestep), output))
        self.ran.append(self.calls - 1)
        if lane == 0:
            self.inputs[stage].append(sample)
            self.error[stage] = 0.0
        return output

    def _decide(self, step: int, stage: int, sample: Tensor) -> bool:
        if self.drawing.skipped is not None:
            is_between = (
                FIRST * self.drawing.order <= step < self.drawing.steps - self.drawing.order
            )
            return is_between and step in self.drawing.skipped
        number = step // self.drawing.order
        last = (self.drawing.steps - 1 - stage) // self.drawing.order
        if number < FIRST or number == last:
            return False
        (_, before), (_, latest) = self.outputs[stage, 0][-2:]
        earlier, given = self.inputs[stage][-2:]
        ratio = mean(latest - before) / mean(latest) / mean(given - earlier)
        self.error[stage] += mean(sample - given) * ratio
        return self.error[stage] < self.drawing.threshold


def mean(tensor: Tensor) -> float:
    return float(tensor.abs().mean())


@pytest.fixture
def site() -> Site:
    return Site()


DRAWINGS = {
    "guidance in one call": Drawing(1),
    "guidance in two calls": Drawing(2, calls_per_step=2),
    "two-call solver": Drawing(3, steps=39, order=2),
    "two-call solver, guidance in two calls": Drawing(4, steps=39, order=2, calls_per_step=2),
    "a control beside": Drawing(5, has_control=True),
    "a control before each of two calls": Drawing(6, calls_per_step=2, has_control=True),
    "a schedule": Drawing(7, skipped=frozenset(range(0, 24, 2))),
    "a schedule and two calls": Drawing(8, calls_per_step=2, skipped=frozenset({4, 5, 9, 23})),
}


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_a_request_gets_what_a_plain_loop_with_the_same_rule_gives(site: Site, drawing: Drawing):
    plain = Plain(drawing)
    expected = plain.run()
    ear = site.add(drawing, "a")
    site.bench.run()

    assert ear.ends == ["finished"]
    assert torch.equal(ear.result, expected)
    assert len(plain.ran) < 0.9 * drawing.calls
    assert site.watcher.skipped_calls == [(drawing.calls, len(plain.ran))]
    assert site.rows_of("a") == [2] * len(plain.ran)
    if drawing.has_control:
        assert len(site.rows_of("a", "control")) == len(plain.ran)


@settings(deadline=None, max_examples=40)
@given(
    drawing=st.builds(
        Drawing,
        seed=st.integers(0, 5),
        steps=st.integers(1, 30),
        order=st.integers(1, 2),
        calls_per_step=st.integers(1, 2),
        has_control=st.booleans(),
        threshold=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1e9]),
        skipped=st.none() | st.frozensets(st.integers(0, 30)),
    ),
    others=st.lists(st.builds(Job, seed=st.integers(10, 99), steps=st.integers(1, 9)), max_size=3),
)
def test_the_rule_holds_whatever_else_there_is(drawing: Drawing, others: list[Job]) -> None:
    site, plain = Site(), Plain(drawing)
    expected = plain.run()
    ears = [site.bench.add(job) for job in others]
    ear = site.add(drawing, "a")
    site.bench.run()

    assert torch.equal(ear.result, expected)
    assert all(torch.equal(e.result, alone(job)) for e, job in zip(ears, others, strict=True))
    ran = {number // drawing.calls_per_step for number in plain.ran}
    assert ran >= set(range(min(FIRST * drawing.order, drawing.steps)))
    assert ran >= set(range(max(drawing.steps - drawing.order, 0), drawing.steps))
    if drawing.threshold == 0 and drawing.skipped is None:
        assert len(ran) == drawing.steps
    for left in range(drawing.calls + 1):
        known = drawing.cache.runs_left(0, left)
        run = sum(number >= drawing.calls - left for number in plain.ran)
        assert known == (None if drawing.skipped is None else run)


def test_who_skips_goes_on_at_that_very_tick(site: Site) -> None:
    site.add(Drawing(1, threshold=1e9), "a")
    site.bench.run(FIRST)
    (track,) = site.bench.batcher.scheduler.running
    assert track.steps_done == FIRST
    # All others are skipped before the last one runs.
    site.bench.run(1)
    assert (track.steps_done, track.steps_skipped) == (24, 20)
    assert track.ended


def test_others_go_on_while_one_skips(site: Site) -> None:
    skipping = site.add(Drawing(1, threshold=1e9), "a")
    site.bench.add(Job(2, steps=24))
    site.bench.run()
    shared = [len(report.requests) for report in site.watcher.forwards if report.stage == "denoise"]
    assert skipping.ends == ["finished"]
    assert shared.count(2) == 4
    told = [report.skipped for report in site.watcher.forwards if report.skipped]
    assert [key.id for keys in told for key in keys] == ["a"]


def test_progress_counts_what_was_skipped(site: Site) -> None:
    site.add(Drawing(1, threshold=0.2), "a", owner="alice")
    site.bench.run(8)
    batcher = site.bench.batcher
    (shown,) = batcher.view("alice").requests
    assert (shown.step - shown.skipped, shown.steps) == (8, 24)
    assert shown.skipped > 0
    assert {name for forward in batcher.view("alice").forwards for name in forward.skipped} == {"a"}
    assert {name for forward in batcher.view().forwards for name in forward.skipped} == {None}


def test_a_deadline_passes_while_steps_are_skipped(site: Site) -> None:
    ear = site.add(Drawing(1, threshold=0.2), "a", deadline_s=0.3)
    site.bench.run()
    assert isinstance(ear.error, ExpiredError)
    assert not site.bench.batcher.scheduler.tracks


def test_a_request_that_is_skipping_can_be_cancelled(site: Site) -> None:
    ear = site.add(Drawing(1, threshold=0.2), "a")
    site.bench.run(5)
    (track,) = site.bench.batcher.scheduler.running
    assert track.decision is not None
    site.bench.batcher.stop_track(track.key, CancelledError("gone"))
    assert ear.ends == ["failed"]
    assert track.state is RequestState.CANCELLED
    assert not site.bench.batcher.tick()


def test_what_a_prediction_raises_ends_its_own_request_alone(site: Site) -> None:
    failing = site.add(Drawing(1, threshold=1e9), "a")
    job = Job(2, steps=24)
    other = site.bench.add(job)
    site.bench.run(4)
    track = site.bench.batcher.scheduler.find(site.bench.batcher.scheduler.tracks[0].key)[0]
    assert track.step_cache is not None
    for history in track.step_cache._current._histories:
        history.outputs.clear()
    site.bench.run()
    assert isinstance(failing.error, KeyError)
    assert torch.equal(other.result, alone(job))
