"""Does sharing forwards leave a pipeline's answers as they are? It is tried, not assumed.

A few requests are made one after another by plain calls, then again at once through a batcher. What
is compared tells more than whether numbers agree:

- a pipeline that changes a shared module for the time of one call (it swaps attention processors,
  scales an adapter) would change it for everyone who is parked meanwhile: `Watch` sees that in the
  plain calls already;
- a rule that is wrong makes shared forwards raise, and retrying one by one hides it: a retry counts
  as a failure;
- rows that are mixed up differ as much as two requests do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from service.domain.timings import Timings
from service.engine.batcher import Batcher
from service.engine.parking import replace_method
from service.engine.track import Track, Work
from service.pipelines.attach import ParkingOptions, ParkingRule, attach, parkable_methods
from service.pipelines.lending import borrow

Trial = Callable[[Any], Tensor]
"""One request: calls the pipeline that it is given, and returns what is to be compared."""

# Largest difference that rounding explains, as a share of the largest value.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
# In half precision rounding is coarse, and only a share of what two requests differ by tells.
SHARE_OF_SEPARATION = 0.25


@dataclass(frozen=True)
class SharingReport:
    """What came of the trials.

    Args:
        calls: of the modules that are called at every step.
        forwards: that they took when the requests ran at once.
        retries: shared forwards that raised.
        difference: largest one between a plain call and the same call at once with others, as a
            share of the largest value.
        separation: smallest difference between two requests, on the same scale.
        bound: what `difference` may be.
        changed: modules that a call changes while it runs.
        error: what the requests raised when they ran at once.
    """

    calls: int = 0
    forwards: int = 0
    retries: int = 0
    difference: float = 0.0
    separation: float = 0.0
    bound: float = 0.0
    changed: tuple[str, ...] = ()
    error: str = ""

    @property
    def calls_per_forward(self) -> float:
        """How much was shared: 1 is nothing."""
        return self.calls / self.forwards if self.forwards else 1.0

    @property
    def objection(self) -> str:
        """Why requests must not share forwards; empty if they may."""
        if self.changed:
            return f"a call changes {', '.join(self.changed)} while it runs"
        if self.error:
            return f"requests fail when they run at once: {self.error}"
        if self.retries:
            return f"{self.retries} shared forwards raised"
        if not self.difference <= self.bound:
            return f"answers differ by {self.difference:.1e}, and the bound is {self.bound:.1e}"
        return ""


@dataclass
class Ear:
    """Keeps what becomes of one trial."""

    result: Any = None
    error: BaseException | None = None

    def accepted(self, position: int, backlog_s: float) -> None:
        """Nothing to do."""

    def started(self) -> None:
        """Nothing to do."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The trial returned."""
        self.result = result

    def failed(self, error: BaseException, timings: Timings) -> None:
        """The trial raised."""
        self.error = error


@dataclass
class Watch:
    """Counts what stepped modules run, and sees modules that are changed while a call runs."""

    pipeline: Any
    forwards: int = 0
    changed: set[str] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look on until the end of the block."""
        undo = [self._look_at(*method) for method in parkable_methods(self.pipeline)]
        try:
            yield
        finally:
            for restore in reversed(undo):
                restore()

    def _look_at(self, path: str, module: nn.Module, rule: ParkingRule) -> Callable[[], None]:
        original = getattr(module, rule.method)
        at_rest = module_state(module)

        # The signature stays: arguments are told apart by the names in it.
        @functools.wraps(original)
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            self.forwards += rule.shared
            if module_state(module) != at_rest:
                self.changed.add(path)
            return original(*args, **kwargs)

        return replace_method(module, rule.method, looked_at)


def module_state(module: nn.Module) -> tuple[object, ...]:
    """What a pipeline might change of a shared module for the time of a call."""
    processors = getattr(module, "attn_processors", {})
    scales = tuple(
        (name, tuple(inner.scaling.values()))
        for name, inner in module.named_modules()
        if isinstance(getattr(inner, "scaling", None), dict)
    )
    first = next(module.parameters(), None)
    return (
        None if first is None else (first.dtype, first.device),
        module.training,
        tuple((name, id(processor)) for name, processor in processors.items()),
        scales,
    )


def check_sharing(
    pipeline: Any,
    trials: Sequence[Trial],
    arrivals: Sequence[int] | None = None,
    max_rows: int = 64,
) -> SharingReport:
    """Run the trials one after another and at once, and compare.

    The pipeline must not be attached to an engine. Run it on the thread that will run the engine.

    Args:
        pipeline: a resident one.
        trials: two or more requests that differ.
        arrivals: at which tick each begins; None means all at the first.
        max_rows: most rows of one shared forward.
    """
    plain_watch = Watch(pipeline)
    with torch.no_grad(), plain_watch.watching():
        plain = [trial(borrow(pipeline)) for trial in trials]
    if plain_watch.changed:
        return SharingReport(changed=tuple(sorted(plain_watch.changed)))
    watch = Watch(pipeline)
    with torch.no_grad(), watch.watching():
        ears, retries = run_at_once(pipeline, trials, arrivals or [0] * len(trials), max_rows)
    errors = [f"{type(e.error).__name__}: {e.error}" for e in ears if e.error is not None]
    calls, forwards = plain_watch.forwards, watch.forwards
    if errors:
        return SharingReport(calls, forwards, retries, error=errors[0])
    separation = smallest_separation(plain)
    return SharingReport(
        calls,
        forwards,
        retries,
        difference=max(difference(p, e.result) for p, e in zip(plain, ears, strict=True)),
        separation=separation,
        bound=ROUNDING.get(dtype_of(pipeline), SHARE_OF_SEPARATION * separation),
    )


def run_at_once(
    pipeline: Any, trials: Sequence[Trial], arrivals: Sequence[int], max_rows: int
) -> tuple[list[Ear], int]:
    """Run the trials through a batcher of their own; returns their ends, and the retries."""
    batcher = Batcher(max_active_rows=max_rows * len(trials))
    ears = [Ear() for _ in trials]
    waiting = sorted(zip(arrivals, range(len(trials)), strict=True))
    detach = attach(pipeline, ParkingOptions(max_rows=max_rows, prompt_cache_bytes=0))
    try:
        tick = 0
        while waiting or batcher.active or batcher.queued:
            while waiting and waiting[0][0] <= tick:
                _, index = waiting.pop(0)
                batcher.add(
                    Track(_work(pipeline, trials[index], index, ears[index]), batcher.clock)
                )
            batcher.tick()
            tick += 1
    finally:
        detach()
    return ears, batcher.counters.retries


def _work(pipeline: Any, trial: Trial, index: int, ear: Ear) -> Work:
    def run() -> Tensor:
        return trial(borrow(pipeline))

    return Work(f"trial-{index}", rows=1, steps=1, pictures=1, run=run, listener=ear)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where shapes disagree or NaN."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double(), other.double()
    largest = max(one.abs().max().item(), 1e-12)
    share = (one - other).abs().max().item() / largest
    return share if share == share else float("inf")


def smallest_separation(results: Sequence[Tensor]) -> float:
    """Smallest difference between two different requests: what a mix-up would at least show."""
    pairs = [(a, b) for i, a in enumerate(results) for b in results[:i]]
    return min(difference(a, b) for a, b in pairs)


def dtype_of(pipeline: Any) -> torch.dtype:
    """Of the modules that are called at every step."""
    stepped = [module for _, module, rule in parkable_methods(pipeline) if rule.shared]
    return next(parameter.dtype for module in stepped for parameter in module.parameters())
