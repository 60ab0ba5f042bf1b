"""Requests that skip steps, on the tiny modules of `engine_fakes`, with a control beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from engine_fakes import WIDTH, Bench, Costly, Ear, make_parkable, make_track
from stepserve.domain.reports import ForwardReport
from stepserve.domain.step_cache import StepCacheUse
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from stepserve.engine.tracks.track import Track
from torch import Tensor


class Control(Costly):
    """Runs beside the denoiser, and gives one residual."""

    def forward(self, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        self.spend(sample)
        return [sample * 0.3]


@dataclass(frozen=True)
class Drawing:
    """A pipeline call: at each step a control, perhaps, then the denoiser once or twice."""

    seed: int
    steps: int = 24
    rows: int = 2
    order: int = 1
    calls_per_step: int = 1
    has_control: bool = False
    threshold: float = 0.1
    skipped: frozenset[int] | None = None

    @property
    def calls(self) -> int:
        return self.steps * self.calls_per_step

    def run(self, denoise: Callable[..., Tensor], control: Callable[..., list[Tensor]]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randn(self.rows, WIDTH, generator=generator, dtype=torch.float64)
        for step in range(self.steps):
            timestep = torch.tensor(float((self.steps - step) ** 1.3) / 5)
            outputs = []
            for number in range(self.calls_per_step):
                text = torch.full(sample.shape, float(number + self.seed % 3))
                if self.has_control:
                    text = text + control(sample, timestep)[0]
                outputs.append(denoise(sample, timestep, text=text))
            pace = 0.03 if step % self.order else 0.05
            sample = sample - pace * sum(outputs)
        return sample

    @property
    def cache(self) -> StepCache:
        phase = CachedPhase(self.calls, self.calls_per_step, self.order, self.skipped)
        return StepCache(StepCacheUse(threshold=self.threshold), [phase], f"{self.threshold}")

    def track(self, bench: Bench, control: Control, name: str = "") -> Track:
        def run() -> Tensor:
            return self.run(
                lambda *args, **named: bench.modules.denoiser(*args, **named)[0], control
            )

        made = make_track(run, name=name or str(self.seed), rows=self.rows, steps=self.calls)
        return replace(made, step_cache=self.cache)


class Watcher:
    def __init__(self) -> None:
        self.forwards: list[ForwardReport] = []
        self.skipped_calls: list[tuple[int, int]] = []

    def forward_ended(self, report: ForwardReport) -> None:
        self.forwards.append(report)

    def request_ended(self, report: Any) -> None:
        timings = report.timings
        self.skipped_calls.append((timings.denoiser_calls, timings.denoiser_calls_run))


class Site:
    """A bench with a control beside the denoiser."""

    def __init__(self) -> None:
        self.watcher = Watcher()
        self.bench = Bench(observers=[self.watcher])
        self.control = Control(self.bench.clock, 0.01, 0.001)
        make_parkable(self.control, "control", "forward", stage="control")

    def add(self, drawing: Drawing, name: str = "", **changes: Any) -> Ear:
        track = drawing.track(self.bench, self.control, name)
        return self.bench.add_track(replace(track, **changes))

    def rows_of(self, name: str, stage: str = "denoise") -> list[int]:
        """Rows of each forward of one request."""
        return [
            rows
            for report in self.watcher.forwards
            for key, rows in report.requests
            if report.stage == stage and key.id == name
        ]
