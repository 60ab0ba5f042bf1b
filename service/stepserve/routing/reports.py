"""What a replica tells about itself, and what a request asks of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stepserve.domain.guidance import CLASSIC, Guidance, StepWork
from stepserve.domain.requests import GenerationRequest

ALONE = ""


@dataclass(frozen=True)
class StepCost:
    """Device seconds of a forward: `fixed_s` whoever takes part, and `row_s` for each row."""

    fixed_s: float
    row_s: float


@dataclass(frozen=True)
class Job:
    """A request as routing sees it.

    Args:
        id: of the request, with its owner before it: callers choose ids.
        size: what decides the cost of its steps, such as `64x64`.
        group: requests of one size and one set of adapters; they share forwards.
        rows: rows that each of its steps takes.
        steps: denoiser calls left.
        images: counted against the replica's limit.
    """

    id: str
    size: str
    group: str
    rows: int
    steps: int
    images: int = 1


@dataclass(frozen=True)
class Report:
    """What a replica has in flight, and what its steps cost there.

    Args:
        jobs: everything accepted and not yet ended.
        costs: by size; only those that were measured.
        image_limit: images in flight beyond which it refuses.
        guidance: what a step of a guided request takes there, and of one that is not.
    """

    jobs: tuple[Job, ...] = ()
    costs: Mapping[str, StepCost] | None = None
    image_limit: int = 64
    guidance: Guidance = CLASSIC

    def to_dict(self) -> dict[str, Any]:
        """As plain values, which is what Ray Serve carries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Report:
        """What `to_dict` made."""
        costs = {size: StepCost(**cost) for size, cost in (told.get("costs") or {}).items()}
        jobs = tuple(Job(**job) for job in told.get("jobs", ()))
        return cls(jobs, costs, told.get("image_limit", 64), _guidance(told.get("guidance")))


def _guidance(told: Mapping[str, Any] | None) -> Guidance:
    if told is None:
        return CLASSIC
    works = {name: StepWork(**told[name]) for name in ("guided", "unguided")}
    return Guidance(**{**told, **works})


def job_of(request: GenerationRequest, guidance: Guidance) -> Job:
    """What a request asks of a replica whose model takes guidance so.

    Schedulers that call the denoiser more than once a step are known to the replica alone.
    """
    strength = 1.0 if request.strength is None else request.strength
    steps = max(math.ceil(request.num_inference_steps * strength), 1)
    return Job(
        id=f"{request.owner}/{request.id}",
        size=size_of(*request.step_size),
        group=group_of(request),
        rows=guidance.rows_of(request),
        steps=guidance.calls_of(request, steps),
        images=request.n,
    )


def size_of(width: int, height: int, images: int = 0) -> str:
    """How a size is called in reports: `64x64`, or `64x64+2` where steps look at two images."""
    return f"{width}x{height}+{images}" if images else f"{width}x{height}"


def group_of(request: GenerationRequest) -> str:
    """Requests of equal groups share forwards on one replica; of `ALONE` none do."""
    if request.reproducible:
        return ALONE
    adapters = sorted(f"{use.name}:{use.scale:g}" for use in request.adapters)
    return " ".join([size_of(*request.step_size), *adapters])
