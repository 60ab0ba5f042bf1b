"""When requests should be finished where one forward may hold rows of several lengths."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fakes import Bench, FakeClock, make_parkable, make_track
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.tracks.track import Phase, Track
from torch import Tensor, nn

LENGTHS = {"small": 10, "medium": 14, "large": 400}
RULES = ArgumentRules(row_lists=frozenset({"samples"}), row_tokens={"samples": len})


class ListDenoiser(nn.Module):
    """It takes as long as so many of the longest rows do."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, samples: list[Tensor], timestep: Tensor) -> list[Tensor]:
        longest = max(len(sample) for sample in samples)
        self.clock.advance(0.040 + 0.0005 * longest * len(samples))
        return [sample * 0.9 for sample in samples]


class ListBench(Bench):
    """A bench whose denoiser takes lists with one entry a row."""

    def __init__(self, mixes_lengths: bool = True) -> None:
        super().__init__()
        self.denoiser = ListDenoiser(self.clock)
        rules = replace(RULES, mixes_lengths=mixes_lengths)
        make_parkable(self.denoiser, "denoiser", "forward", stage="denoise", rules=rules)

    def draw(self, size: str, steps: int) -> list[Tensor]:
        """A pipeline call."""
        samples = [torch.zeros(LENGTHS[size], 1, dtype=torch.float64)]
        for step in range(steps):
            samples = self.denoiser(samples, torch.tensor([float(step)]))
        return samples

    def track(self, size: str, steps: int = 8, **changes: Any) -> Track:
        track = make_track(lambda: self.draw(size, steps), name=f"{size}{steps}", rows=1)
        return replace(track, phases=(Phase(steps, size),), clock=self.clock, **changes)

    def learn(self) -> None:
        """Let it measure forwards of every length, alone and together."""
        for sizes in (["small"], ["medium"], ["large"], ["small", "small"], ["small", "medium"]):
            for number, size in enumerate(sizes):
                self.batcher.scheduler.add(self.track(size, 5 + number))
            self.run()

    def errors(self, *tracks: Track) -> list[float]:
        """Relative errors of when these should end if all come now."""
        began_s = self.clock.now_s
        expected = self.finish_times_s(*tracks)
        for track in tracks:
            self.batcher.scheduler.add(track)
        ended_s: dict[str, float] = {}
        while self.batcher.tick():
            for name in self.ended[-len(tracks) :]:
                ended_s.setdefault(name, self.clock.now_s - began_s)
        return [
            abs(seconds - ended_s[track.id]) / ended_s[track.id]
            for seconds, track in zip(expected, tracks, strict=True)
        ]


@pytest.fixture
def bench() -> ListBench:
    bench = ListBench()
    bench.learn()
    return bench


def test_lengths_that_share_forwards_are_counted_as_the_longest(bench: ListBench) -> None:
    together_s = 8 * (0.040 + 2 * 0.0005 * LENGTHS["medium"])
    expected = bench.finish_times_s(bench.track("small"), bench.track("medium"))
    assert expected == pytest.approx([together_s, together_s], rel=0.1)


def test_lengths_that_had_better_run_apart_are_counted_so(bench: ListBench) -> None:
    small_s, large_s = (8 * (0.040 + 0.0005 * LENGTHS[size]) for size in ("small", "large"))
    expected = bench.finish_times_s(bench.track("small"), bench.track("large"))
    assert expected == pytest.approx([small_s, small_s + large_s], rel=0.1)


@pytest.mark.parametrize("keeps_apart", [{"isolated": True}, {"variant": "a style"}])
def test_requests_that_keep_apart_are_counted_so(
    bench: ListBench, keeps_apart: dict[str, Any]
) -> None:
    expected = bench.finish_times_s(bench.track("small"), bench.track("medium", **keeps_apart))
    serial_s = bench.finish_times_s(bench.track("small"))[0]
    assert min(expected) == pytest.approx(serial_s)
    assert max(expected) == pytest.approx(
        sum(bench.finish_times_s(t)[0] for t in (bench.track("small"), bench.track("medium")))
    )


def test_where_lengths_are_not_mixed_they_are_counted_apart() -> None:
    bench = ListBench(mixes_lengths=False)
    bench.learn()
    small_s, medium_s = (8 * (0.040 + 0.0005 * LENGTHS[size]) for size in ("small", "medium"))
    expected = bench.finish_times_s(bench.track("small"), bench.track("medium"))
    assert expected == pytest.approx([small_s, small_s + medium_s], rel=0.1)


def test_what_is_predicted_comes_true(bench: ListBench) -> None:
    tracks = [
        bench.track("small", 4),
        bench.track("medium", 9),
        bench.track("large", 7),
        bench.track("small", 12),
        bench.track("medium", 3),
    ]
    assert statistics.median(bench.errors(*tracks)) < 0.1
