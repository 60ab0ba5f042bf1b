"""What a replica tells about itself, and what a request asks of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stepserve.domain.guidance import CLASSIC, Guidance, StepWork
from stepserve.domain.requests import AdapterUse, GenerationRequest

ALONE = ""
NO_SHARES: Mapping[str, float] = {}


@dataclass(frozen=True)
class StepCost:
    """Device seconds of a forward: `fixed_s` whoever takes part, and `row_s` for each row."""

    fixed_s: float
    row_s: float


@dataclass(frozen=True)
class AdapterMixing:
    """Which requests with different adapters, or with none, share forwards on a replica.

    Args:
        is_done: whether any do.
        separate: names of adapters with which they do not.
    """

    is_done: bool = False
    separate: tuple[str, ...] = ()

    def keeps_apart(self, adapters: Sequence[AdapterUse]) -> bool:
        """Whether requests with these share forwards with those of the same adapters only."""
        return not self.is_done or any(use.name in self.separate for use in adapters)


SEPARATE = AdapterMixing()


@dataclass(frozen=True)
class LaterSteps:
    """Steps that a request goes on with at another size; as in `Job`."""

    size: str
    group: str
    steps: int


@dataclass(frozen=True)
class Job:
    """A request as routing sees it.

    Args:
        id: of the request, with its owner before it: callers choose ids.
        size: what decides the cost of its steps, such as `64x64`.
        group: requests of one size, and of one set of adapters where those keep requests apart;
            they share forwards.
        rows: rows that each of its steps takes.
        steps: denoiser calls left of that size, without those that should be skipped.
        images: counted against the replica's limit.
        later: what it does afterwards.
    """

    id: str
    size: str
    group: str
    rows: int
    steps: int
    images: int = 1
    later: tuple[LaterSteps, ...] = ()

    @property
    def parts(self) -> tuple[LaterSteps, ...]:
        """Its steps of each size, in their order."""
        return (LaterSteps(self.size, self.group, self.steps), *self.later)

    @property
    def all_steps(self) -> int:
        """Denoiser calls left of all sizes."""
        return sum(part.steps for part in self.parts)

    def left(self, rows: int, steps: Sequence[int]) -> Job:
        """What is left of it: so many steps of each of its last sizes."""
        first, *later = (
            replace(part, steps=left)
            for part, left in zip(self.parts[-len(steps) :], steps, strict=True)
        )
        return replace(
            self,
            size=first.size,
            group=first.group,
            rows=rows,
            steps=first.steps,
            later=tuple(later),
        )


@dataclass(frozen=True)
class Report:
    """What a replica has in flight, and what its steps cost there.

    Args:
        jobs: everything accepted and not yet ended.
        costs: by size; only those that were measured.
        image_limit: images in flight beyond which it refuses.
        guidance: what a step of a guided request takes there, and of one that is not.
        run_shares: which share of the denoiser calls of requests with a step cache runs, by
            `GenerationRequest.step_cache_kind`; only those that were seen.
        adapters: which requests with different ones share forwards there.
    """

    jobs: tuple[Job, ...] = ()
    costs: Mapping[str, StepCost] | None = None
    image_limit: int = 64
    guidance: Guidance = CLASSIC
    run_shares: Mapping[str, float] = field(default_factory=dict)
    adapters: AdapterMixing = SEPARATE

    def to_dict(self) -> dict[str, Any]:
        """As plain values, which is what Ray Serve carries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Report:
        """What `to_dict` made."""
        costs = {size: StepCost(**cost) for size, cost in (told.get("costs") or {}).items()}
        jobs = tuple(_job(job) for job in told.get("jobs", ()))
        return cls(
            jobs,
            costs,
            told.get("image_limit", 64),
            _guidance(told.get("guidance")),
            told.get("run_shares", {}),
            AdapterMixing(**told.get("adapters", {})),
        )


def _job(told: Mapping[str, Any]) -> Job:
    return Job(**{**told, "later": tuple(LaterSteps(**part) for part in told.get("later", ()))})


def _guidance(told: Mapping[str, Any] | None) -> Guidance:
    if told is None:
        return CLASSIC
    works = {name: StepWork(**told[name]) for name in ("guided", "unguided")}
    return Guidance(**{**told, **works})


def job_of(
    request: GenerationRequest,
    guidance: Guidance,
    run_shares: Mapping[str, float] = NO_SHARES,
    adapters: AdapterMixing = SEPARATE,
) -> Job:
    """What a request asks of a replica whose model takes guidance and adapters so.

    Schedulers that call the denoiser more than once a step are known to the replica alone.

    Args:
        request: that is to be sent.
        guidance: of the model.
        run_shares: as in `Report`.
        adapters: the same.
    """
    share = run_shares.get(request.step_cache_kind, 1.0)
    first, *later = (
        LaterSteps(
            size_of(*part.step_size),
            group_of(part, adapters),
            math.ceil(share * guidance.calls_of(part, part.expected_steps)),
        )
        for part in request.phases
    )
    return Job(
        id=f"{request.owner}/{request.id}",
        size=first.size,
        group=first.group,
        rows=guidance.rows_of(request),
        steps=first.steps,
        images=request.n,
        later=tuple(later),
    )


def size_of(width: int, height: int, images: int = 0) -> str:
    """How a size is called in reports: `64x64`, or `64x64+2` where steps look at two images."""
    return f"{width}x{height}+{images}" if images else f"{width}x{height}"


def group_of(request: GenerationRequest, adapters: AdapterMixing = SEPARATE) -> str:
    """Requests of equal groups share forwards on one replica; of `ALONE` none do."""
    if request.reproducible:
        return ALONE
    apart = request.adapters if adapters.keeps_apart(request.adapters) else ()
    named = sorted(f"{use.name}:{use.scale:g}" for use in apart)
    return " ".join([size_of(*request.step_size), *named])
