"""Requests whose calls of one module are skipped wherever they may be, and predicted exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from engine_fakes import Bench, make_parkable, make_track
from stepserve.domain.step_cache import StepCacheUse
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from torch import Tensor, nn

ALWAYS = StepCacheUse(threshold=1e9)
STEPS = 8
# Of 8 steps: the first three and the last one.
RUN = [0, 1, 2, 7]


class Network(nn.Module):
    """Its output is a straight line in the timestep, so that a prediction is exact."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda output: (output,)) -> None:
        super().__init__()
        self.wrap = wrap
        self.seen: list[float] = []

    def forward(self, sample: Tensor, timestep: Any, *, text: Tensor | None = None) -> Any:
        at = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)
        self.seen.append(at.max().item())
        shift = 0.0 if text is None else text[:, :1].to(sample.dtype)
        return self.wrap(sample * 0 + at.max().to(sample.dtype) * 0.25 + shift)


class ListNetwork(Network):
    """Takes and gives lists with one tensor a row, as Z-Image does."""

    def forward(self, x: list[Tensor], t: Tensor) -> Any:  # type: ignore[override]
        self.seen.append(t.max().item())
        return [row * 0 + t.max() * 0.25 for row in x], {"kept": len(self.seen)}


def serve(
    module: nn.Module,
    run: Callable[[], Any],
    *phases: CachedPhase,
    rules: ArgumentRules | None = None,
    stage: str = "denoise",
    use: StepCacheUse = ALWAYS,
    **changes: Any,
) -> Any:
    """What a request gets whose calls of a module are skipped wherever they may be."""
    options = {} if rules is None else {"rules": rules}
    undo = make_parkable(module, "module", "forward", stage=stage, **options)
    bench = Bench()
    track = make_track(run, steps=sum(phase.calls for phase in phases))
    ear = bench.add_track(replace(track, step_cache=StepCache(use, phases), **changes))
    bench.run()
    undo()
    assert ear.ends == ["finished"], ear.error
    return ear.result


def sample(rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(1, 2, rows * 6, dtype=torch.float64).reshape(rows, 6).to(dtype)


def noisy(step: int, rows: int = 2) -> Tensor:
    """Inputs that change, as else nothing is known of how outputs follow them."""
    return sample(rows) * (1 + step)


def at(step: int) -> float:
    return float(900 - 100 * step)
