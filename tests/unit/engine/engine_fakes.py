"""A clock that is set by hand, and a tiny pipeline whose modules cost what the clock says.

All arithmetic is elementwise, so a row has the same bits in any batch: any difference between a
shared and a plain run is a mistake of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from stepserve.domain.timings import Timings
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.engine.loop.accounting import Observer
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.loop.execution import DEFAULT_EXECUTION, Execution
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.policy import SHORTEST_FIRST, Policy
from stepserve.engine.tracks.interception import parameter_names, parkable, replace_method
from stepserve.engine.tracks.track import Phase, Track
from torch import Tensor, nn

WIDTH = 4


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class PoisonedError(RuntimeError):
    """What a module raises when one of its rows is poisoned."""


class Costly(nn.Module):
    """Advances the clock at each forward, and refuses rows that are not finite."""

    def __init__(self, clock: FakeClock, fixed_s: float, per_row_s: float) -> None:
        super().__init__()
        self.clock, self.fixed_s, self.per_row_s = clock, fixed_s, per_row_s
        self.rows: list[int] = []
        self.grad_enabled: set[bool] = set()

    def spend(self, value: Tensor) -> None:
        rows = value.shape[0]
        self.clock.advance(self.fixed_s + self.per_row_s * rows)
        if not torch.isfinite(value).all():
            raise PoisonedError("poisoned")
        self.rows.append(rows)
        self.grad_enabled.add(torch.is_grad_enabled())


class Encoder(Costly):
    def forward(self, tokens: Tensor) -> Tensor:
        self.spend(tokens)
        return tokens * 0.5 + 1.0


class Denoiser(Costly):
    def forward(self, sample: Tensor, timestep: Tensor, *, text: Tensor) -> tuple[Tensor]:
        self.spend(sample)
        steps = timestep.reshape(-1, 1).to(sample.dtype)
        return (torch.tanh(sample * 0.9 + text * 0.1 + steps * 0.01),)


class Decoder(Costly):
    def forward(self, latents: Tensor) -> Tensor:
        self.spend(latents)
        return latents * 2.0 + 1.0


def make_parkable(
    module: object, module_name: str, method_name: str, **options: Any
) -> Callable[[], None]:
    """Put `parkable` around a method of one instance; returns a function that undoes it."""
    run = getattr(module, method_name)
    method = ParkableMethod(
        module_name, method_name, run, parameters=parameter_names(run), **options
    )
    return replace_method(module, method_name, parkable(method))


class Modules:
    """Resident modules that all requests share."""

    def __init__(
        self,
        clock: FakeClock | None = None,
        max_rows: int = 32,
        bucket_rows: tuple[int, ...] = (),
    ) -> None:
        self.clock = clock or FakeClock()
        self.encoder = Encoder(self.clock, 0.002, 0.0001)
        self.denoiser = Denoiser(self.clock, 0.040, 0.002)
        self.decoder = Decoder(self.clock, 0.005, 0.001)
        self.undo = [
            make_parkable(
                module, name, "forward", stage=stage, max_rows=max_rows, bucket_rows=bucket_rows
            )
            for module, name, stage in (
                (self.encoder, "encoder", "encode"),
                (self.denoiser, "denoiser", "denoise"),
                (self.decoder, "decoder", "decode"),
            )
        ]


@dataclass(frozen=True)
class Job:
    """What one request asks of the tiny pipeline."""

    seed: int
    steps: int = 3
    rows: int = 2
    poisoned_at: int | None = None
    raises_at: int | None = None

    def run(self, modules: Modules) -> Tensor:
        """The pipeline call: ordinary code that knows nothing of the engine."""
        generator = torch.Generator().manual_seed(self.seed)
        text = modules.encoder(torch.full((self.rows, WIDTH), float(self.seed)))
        sample = torch.randn(self.rows, WIDTH, generator=generator, dtype=torch.float64)
        for step in range(self.steps):
            if step == self.raises_at:
                raise ValueError(f"own Python of {self.seed}")
            if step == self.poisoned_at:
                sample = sample * float("nan")
            timestep = torch.tensor(step if self.seed % 2 else float(step))
            sample = sample - 0.1 * modules.denoiser(sample, timestep, text=text)[0]
        return modules.decoder(sample)


@dataclass
class Ear:
    """A listener that remembers everything it hears."""

    news: list[str] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    timings: Timings | None = None
    expected_s: float | None = None

    def accepted(self, position: int, expected_s: float) -> None:
        self.news.append("accepted")
        self.expected_s = expected_s

    def started(self) -> None:
        self.news.append("started")

    def finished(self, result: Any, timings: Timings) -> None:
        self.news.append("finished")
        self.result, self.timings = result, timings

    def failed(self, error: BaseException, timings: Timings) -> None:
        self.news.append("failed")
        self.error, self.timings = error, timings

    @property
    def ends(self) -> list[str]:
        return [word for word in self.news if word in ("finished", "failed")]


def make_track(
    run: Callable[[], Any],
    *,
    name: str = "r",
    rows: int = 2,
    steps: int = 3,
    images: int = 1,
    ear: Any = None,
) -> Track:
    return Track(name, rows, (Phase(steps),), images, run, ear or Ear())


def job_track(modules: Modules, job: Job, ear: Ear | None = None) -> Track:
    return make_track(
        lambda: job.run(modules),
        name=str(job.seed),
        rows=job.rows,
        steps=job.steps,
        ear=ear,
    )


class Bench:
    """A batcher on a fake clock, stepped by hand."""

    def __init__(
        self,
        max_rows: int = 32,
        bucket_rows: tuple[int, ...] = (),
        policy: Policy = SHORTEST_FIRST,
        execution: Execution = DEFAULT_EXECUTION,
        clock: FakeClock | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.modules = Modules(clock, max_rows=max_rows, bucket_rows=bucket_rows)
        self.clock = self.modules.clock
        self.ended: list[str] = []
        self.max_rows = max_rows
        self.estimator = CompletionEstimator()
        self.batcher = Batcher(
            max_rows,
            execution,
            self.estimator,
            self.clock,
            on_ended=self._on_ended,
            policy=policy,
            observers=observers,
        )

    def finish_times_s(self, *newcomers: Track) -> Sequence[float]:
        """Seconds until everything that was added, and these, should be finished."""
        tracks = [*self.batcher.scheduler.tracks, *newcomers]
        return self.estimator.forecast(tracks, self.max_rows).finish_s

    def _on_ended(self, track: Track) -> None:
        self.ended.append(track.id)

    def add(self, job: Job) -> Ear:
        return self.add_track(job_track(self.modules, job))

    def add_track(self, track: Track) -> Ear:
        """Submit it now, by the clock of the bench."""
        self.batcher.scheduler.add(replace(track, clock=self.clock))
        assert isinstance(track.listener, Ear)
        return track.listener

    def run(self, ticks: int | None = None) -> int:
        """Tick until there is nothing to do, or so many times; returns ticks that did something."""
        count = 0
        while (ticks is None or count < ticks) and self.batcher.tick():
            count += 1
        return count


def alone(job: Job) -> Tensor:
    """The same job as a plain call, without any engine."""
    return job.run(Modules())


def tensor_call(
    *args: Any,
    rule: ParkableMethod | None = None,
    sequence: int = 0,
    **kwargs: Any,
) -> Call:
    method = rule or ParkableMethod("module", "forward", lambda *a, **k: None)
    return make_call(method, args, kwargs, sequence)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
