"""Does sharing forwards leave a pipeline's answers as they are? It is tried, not assumed.

A few requests are made one after another by plain calls, then again at once through a batcher. What
is compared shows more than whether numbers agree:

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepserve.domain.timings import Timings
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.loop.execution import Execution
from stepserve.engine.scheduling.policy import (
    SHORTEST_FIRST,
    CostOf,
    LimitOf,
    Parked,
    fit_rows,
    groups,
    method_limit,
)
from stepserve.engine.tracks.interception import replace_method
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.modules.parking import ParkingOptions, ParkingRule, parkable_methods
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules

ProbeRequest = Callable[[], Tensor]
"""One request: calls a copied pipeline, and returns what is to be compared."""

# Nothing is cached: every probe request is to take its own way.
ENOUGH_ROWS = ParkingOptions(max_rows=64, prompt_cache_bytes=0)
# Largest difference that rounding explains, as a share of the largest value.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
# In half precision rounding is coarse, and only a share of what two requests differ by counts.
SHARE_OF_SEPARATION = 0.25


@dataclass(frozen=True)
class SharingReport:
    """What came of the probes.

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
class ProbeListener:
    """Keeps what becomes of one probe request."""

    result: Any = None
    error: BaseException | None = None

    def accepted(self, position: int, expected_s: float) -> None:
        """Nobody waits for it."""

    def started(self) -> None:
        """Nobody waits for it."""

    def finished(self, result: Any, timings: Timings) -> None:
        """The pipeline call returned."""
        self.result = result

    def failed(self, error: BaseException, timings: Timings) -> None:
        """The pipeline call raised."""
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
        with ExitStack() as undo:
            for method in parkable_methods(self.pipeline):
                undo.callback(self._look_at(*method))
            yield

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
    # Some read an inner layer through a hook, which a call of somebody else would fill. Those with
    # which transformers collects hidden states are set at the first call, and stay.
    hooks = tuple(
        key
        for inner in module.modules()
        for key, hook in inner._forward_hooks.items()
        if not getattr(hook, "__module__", "").startswith("transformers.")
    )
    # Some guiders have layers skipped for one of the predictions of a step.
    diffusers_hooks = tuple(
        (name, tuple(inner._diffusers_hook.hooks))
        for name, inner in module.named_modules()
        if hasattr(inner, "_diffusers_hook") and inner._diffusers_hook.hooks
    )
    first = next(module.parameters(), None)
    return (
        None if first is None else (first.dtype, first.device),
        module.training,
        tuple((name, id(processor)) for name, processor in processors.items()),
        scales,
        hooks,
        diffusers_hooks,
    )


@dataclass(frozen=True)
class PlainRun:
    """What plain calls gave, one after another.

    Args:
        results: of each probe request.
        calls: of the stepped modules.
        changed: components that some probe request changes while it runs.
    """

    results: list[Tensor]
    calls: int
    changed: frozenset[str]


def run_plainly(pipeline: Any, probes: Sequence[ProbeRequest]) -> PlainRun:
    """Run the probes one after another, without an engine."""
    watch = Watch(pipeline)
    with torch.no_grad(), watch.watching():
        results = [probe() for probe in probes]
    return PlainRun(results, watch.forwards, frozenset(watch.changed))


def check_sharing(
    pipeline: Any,
    probes: Sequence[ProbeRequest],
    plain: PlainRun | None = None,
    arrivals: Sequence[int] | None = None,
    options: ParkingOptions = ENOUGH_ROWS,
    one_at_a_time: bool = False,
) -> SharingReport:
    """Run the probes at once, and compare with what they give one after another.

    The pipeline must not be attached to an engine. Run it on the thread that will run the engine.

    Args:
        pipeline: a resident one.
        probes: two or more requests that differ.
        plain: what they gave one after another, if they were run before.
        arrivals: at which tick each begins; None means all at the first.
        options: how it is attached; components that are inline there may be changed by a call.
        one_at_a_time: none starts before the running one has ended; a call may change anything.
    """
    plain = plain or run_plainly(pipeline, probes)
    changed = plain.changed - options.inline
    if changed and not one_at_a_time:
        return SharingReport(changed=tuple(sorted(changed)))
    batcher = Batcher(
        len(probes),
        Execution(one_at_a_time=one_at_a_time),
        policy=replace(SHORTEST_FIRST, pick=InStep()),
    )
    watch = Watch(pipeline)
    with torch.no_grad(), watch.watching():
        listeners = run_at_once(batcher, pipeline, probes, arrivals or [0] * len(probes), options)
    report = SharingReport(plain.calls, watch.forwards, batcher.counters.retries)
    errors = [f"{type(e.error).__name__}: {e.error}" for e in listeners if e.error is not None]
    if errors:
        return replace(report, error=errors[0])
    separation = smallest_separation(plain.results)
    return replace(
        report,
        difference=max(
            difference(p, e.result) for p, e in zip(plain.results, listeners, strict=True)
        ),
        separation=separation,
        bound=ROUNDING.get(dtype_of(pipeline), SHARE_OF_SEPARATION * separation),
    )


def run_at_once(
    batcher: Batcher,
    pipeline: Any,
    probes: Sequence[ProbeRequest],
    arrivals: Sequence[int],
    options: ParkingOptions,
) -> list[ProbeListener]:
    """Run the probes through a batcher; returns what became of each."""
    listeners = [ProbeListener() for _ in probes]
    waiting = sorted(zip(arrivals, range(len(probes)), strict=True))
    unwrap = wrap_modules(pipeline, Wrappers(parking=options))
    try:
        tick = 0
        while waiting or batcher.scheduler.tracks:
            while waiting and waiting[0][0] <= tick:
                _, index = waiting.pop(0)
                batcher.scheduler.add(probe_track(index, probes[index], listeners[index]))
            batcher.tick()
            tick += 1
    finally:
        unwrap()
    return listeners


def probe_track(index: int, probe: ProbeRequest, listener: ProbeListener) -> Track:
    """A probe request as the engine wants it."""
    return Track(f"probe-{index}", 1, (Phase(1),), images=1, run=probe, listener=listener)


class InStep:
    """Calls of the module that was called first go first, so that no probe gets ahead of others.

    What is tried is that they may share, for which they have to be in step.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(
        self, parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
    ) -> list[Parked]:
        """The calls for the next forward; empty if nothing is parked."""
        waiting = groups(parked)
        for group in waiting:
            self._seen.setdefault(group[0].call.method.name, len(self._seen))
        # `min` keeps the first of equals, which is the group with the oldest call.
        group = min(waiting, key=lambda group: self._seen[group[0].call.method.name], default=[])
        return fit_rows(group, limit_of) if group else []


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors of any one shape, as a share of the largest value.

    Infinite where shapes disagree or a number is NaN.
    """
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double(), other.double()
    largest = max(one.abs().max().item(), 1e-12)
    share = (one - other).abs().max().item() / largest
    return share if share == share else float("inf")


def smallest_separation(results: Sequence[Tensor]) -> float:
    """Smallest difference between two requests of any one shape: what a mix-up would show."""
    pairs = [(a, b) for i, a in enumerate(results) for b in results[:i]]
    return min(difference(a, b) for a, b in pairs)


def dtype_of(pipeline: Any) -> torch.dtype:
    """Of the modules that are called at every step."""
    stepped = [module for _, module, rule in parkable_methods(pipeline) if rule.shared]
    return next(parameter.dtype for module in stepped for parameter in module.parameters())
