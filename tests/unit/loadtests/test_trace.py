"""The trace that every server is measured with."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.load.trace import (
    HOMOGENEOUS,
    MIXED,
    Mix,
    TraceRequest,
    arrivals_at,
    arrivals_through,
    draw_gaps,
    draw_trace,
    offered_rate_per_s,
    read_trace,
    write_trace,
)

SEEDS = st.integers(0, 2**32)
RATES = st.floats(0.01, 1000)


@given(SEEDS, st.integers(0, 40), st.integers(0, 40))
def test_a_seed_always_gives_the_same_trace_and_longer_ones_go_on(seed, short, more) -> None:
    longer = draw_trace(MIXED, short + more, seed)
    assert draw_trace(MIXED, short, seed) == longer[:short]
    assert draw_gaps(short, seed) == draw_gaps(short + more, seed)[:short]


def test_seeds_give_different_traces() -> None:
    assert draw_trace(MIXED, 20, 0) != draw_trace(MIXED, 20, 1)
    assert draw_gaps(20, 0) != draw_gaps(20, 1)


def test_the_mix_is_as_skewed_as_it_says() -> None:
    trace = draw_trace(MIXED, 4000, seed=0)
    steps = [request.num_inference_steps for request in trace]
    assert min(steps) == 4
    assert max(steps) == 100
    longest_fifth = sorted(steps)[-len(steps) // 5 :]
    assert sum(longest_fifth) > 0.45 * sum(steps)
    cancelled = sum(request.cancel_after is not None for request in trace) / len(trace)
    assert cancelled == pytest.approx(0.05, abs=0.015)
    assert {request.n for request in trace} == {1, 2, 3, 4}
    sizes = Counter(request.size for request in trace)
    assert len(sizes) == 3
    assert sizes["64x64"] == max(sizes.values())
    assert len({request.scheduler for request in trace}) >= 4
    assert {request.guidance_scale > 1 for request in trace} == {True, False}
    assert len({request.prompt for request in trace}) > 3900
    assert all(request.strength is None for request in trace)


def test_edits_come_where_asked_and_change_nothing_else() -> None:
    edits = draw_trace(Mix(image_to_image_share=0.5), 200, seed=1)
    assert 60 < sum(request.strength is not None for request in edits) < 140
    plain = draw_trace(MIXED, 200, seed=1)
    assert [r.num_inference_steps for r in edits] == [r.num_inference_steps for r in plain]


def test_requests_of_the_homogeneous_mix_differ_in_prompt_and_seed_only() -> None:
    keys = {
        (r.size, r.num_inference_steps, r.guidance_scale, r.scheduler, r.n, r.cancel_after)
        for r in draw_trace(HOMOGENEOUS, 50, seed=0)
    }
    assert len(keys) == 1


def test_rows_and_calls_follow_guidance_images_and_strength() -> None:
    request = TraceRequest("x", "64x64", 20, 4.0, "DDIMScheduler", 1, n=3, strength=0.6)
    assert (request.rows, request.denoiser_calls) == (6, 12)
    unguided = TraceRequest("x", "64x64", 20, 1.0, "DDIMScheduler", 1)
    assert (unguided.rows, unguided.denoiser_calls) == (1, 20)


@given(SEEDS, RATES, RATES)
def test_two_rates_meet_the_same_pattern(seed, one, other) -> None:
    gaps = draw_gaps(30, seed)
    slow, fast = arrivals_at(one, gaps), arrivals_at(other, gaps)
    assert [at * one for at in slow] == pytest.approx([at * other for at in fast])
    assert list(slow) == sorted(slow)


@pytest.mark.parametrize("variation", [0.0, 1.0, 3.0])
def test_gaps_have_a_mean_of_one_and_the_variation_asked_for(variation: float) -> None:
    gaps = draw_gaps(20_000, seed=5, variation=variation)
    assert statistics.mean(gaps) == pytest.approx(1, rel=0.08)
    assert statistics.pstdev(gaps) == pytest.approx(variation, rel=0.08)


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_over_zero(rate_per_s: float) -> None:
    with pytest.raises(ValueError, match="rate_per_s"):
        arrivals_at(rate_per_s, [1.0])


def test_the_offered_rate_counts_to_the_last_arrival() -> None:
    arrivals = arrivals_at(8.0, draw_gaps(5000, 2))
    assert offered_rate_per_s(arrivals) == pytest.approx(8, rel=0.05)
    assert offered_rate_per_s(()) == 0


def test_phases_follow_one_another_at_their_rates() -> None:
    phases = ((5.0, 40.0), (20.0, 40.0), (2.0, 40.0))
    arrivals = arrivals_through(phases, draw_gaps(3000, 3))
    counts = [sum(40 * i <= at < 40 * (i + 1) for at in arrivals) for i in range(3)]
    assert counts == pytest.approx([200, 800, 80], rel=0.25)
    assert list(arrivals) == sorted(arrivals)
    assert arrivals[-1] <= 120


@given(RATES)
def test_one_phase_is_one_rate(rate_per_s) -> None:
    gaps = draw_gaps(20, 4)
    through = arrivals_through([(rate_per_s, 1e6)], gaps)
    assert list(through) == pytest.approx(list(arrivals_at(rate_per_s, gaps)))


def test_a_recorded_trace_reads_back(tmp_path: Path) -> None:
    requests, arrivals = draw_trace(MIXED, 12, 6), arrivals_at(3.0, draw_gaps(12, 6))
    write_trace(tmp_path / "trace.jsonl", requests, arrivals)
    assert read_trace(tmp_path / "trace.jsonl") == (requests, arrivals)


def test_a_file_of_arrivals_alone_gets_requests_drawn(tmp_path: Path) -> None:
    file = tmp_path / "arrivals.jsonl"
    file.write_text('{"at_s": 0.5}\n\n{"at_s": 2, "num_inference_steps": 7, "unknown": 1}\n')
    requests, arrivals = read_trace(file, seed=9)
    drawn = draw_trace(MIXED, 2, 9)
    assert arrivals == (0.5, 2.0)
    assert requests[0] == drawn[0]
    assert requests[1].num_inference_steps == 7
    assert requests[1].prompt == drawn[1].prompt


@pytest.mark.parametrize(
    ("text", "complaint"),
    [('{"at_s": 2}\n{"at_s": 1}', "back in time"), ('{"at": 2}', "line 1"), ("[1]", "line 1")],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "wrong.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_trace(tmp_path / "wrong.jsonl")
