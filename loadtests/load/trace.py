"""A seeded trace of requests and the moments they arrive. Pure: the same seed, the same trace.

Real traffic is skewed: most requests use the defaults, a few are far longer. So step counts have a
heavy tail (4 to 100), and one size, one scheduler and one image are the commonest. Guidance has
one value where it is on, which favours servers that batch requests of equal parameters.

Gaps between arrivals are drawn before anything is sent, with a mean of one, and scaled to a rate:
two rates, and two servers, meet the very same requests in the very same pattern.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

Weighted = tuple[tuple[T, float], ...]
"""Values and how often each is drawn; the weights need not sum to 1."""

STEPS: Weighted[int] = (
    (4, 0.25),
    (8, 0.15),
    (12, 0.10),
    (20, 0.25),
    (28, 0.08),
    (35, 0.05),
    (50, 0.07),
    (75, 0.03),
    (100, 0.02),
)
SIZES: Weighted[str] = (("64x64", 0.6), ("48x48", 0.2), ("96x96", 0.2))
SCHEDULERS: Weighted[str] = (
    ("DDIMScheduler", 0.4),
    ("EulerDiscreteScheduler", 0.2),
    ("DPMSolverMultistepScheduler", 0.2),
    ("EulerAncestralDiscreteScheduler", 0.1),
    ("UniPCMultistepScheduler", 0.1),
)
GUIDANCE_SCALES: Weighted[float] = ((4.0, 0.8), (1.0, 0.2))
IMAGES: Weighted[int] = ((1, 0.75), (2, 0.15), (3, 0.05), (4, 0.05))
SUBJECTS = ("red heart", "pizza", "rocket", "cat face", "sunflower", "green apple", "castle")
BACKGROUNDS = ("", " on a blue background", " on a yellow background", ", fluent style")
STRENGTH = 0.6
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    `strength` is None for text-to-image. The client leaves after `cancel_after` times the request's
    unloaded seconds; None: it waits.
    """

    prompt: str
    size: str
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    n: int = 1
    strength: float | None = None
    cancel_after: float | None = None

    @property
    def rows(self) -> int:
        """Rows of one denoiser forward: guidance needs two for each image."""
        return self.n * (2 if self.guidance_scale > 1 else 1)

    @property
    def denoiser_calls(self) -> int:
        """A strength below 1 leaves steps out."""
        if self.strength is None:
            return self.num_inference_steps
        return max(int(self.num_inference_steps * self.strength), 1)


@dataclass(frozen=True)
class Mix:
    """What requests a trace is made of."""

    steps: Weighted[int] = STEPS
    sizes: Weighted[str] = SIZES
    schedulers: Weighted[str] = SCHEDULERS
    guidance_scales: Weighted[float] = GUIDANCE_SCALES
    images: Weighted[int] = IMAGES
    image_to_image_share: float = 0.0
    cancelled_share: float = 0.05


MIXED = Mix()
HOMOGENEOUS = Mix(
    steps=((20, 1.0),),
    sizes=(("64x64", 1.0),),
    schedulers=(("DDIMScheduler", 1.0),),
    guidance_scales=((4.0, 1.0),),
    images=((1, 1.0),),
    cancelled_share=0.0,
)
MIXES = {"mixed": MIXED, "homogeneous": HOMOGENEOUS}


def weigh_sizes(sizes: Sequence[str]) -> Weighted[str]:
    """The first is the commonest, as in the mix itself."""
    others = 0.4 / max(len(sizes) - 1, 1)
    return tuple((size, others if index else 0.6) for index, size in enumerate(sizes))


def draw_trace(mix: Mix, count: int, seed: int) -> tuple[TraceRequest, ...]:
    """Draw `count` requests. A longer trace begins with the shorter one of the same seed."""
    chance = random.Random(f"requests-{seed}")
    return tuple(_draw_request(mix, chance) for _ in range(count))


def draw_gaps(count: int, seed: int, variation: float = 1.0) -> tuple[float, ...]:
    """Gaps before each arrival, with a mean of 1.

    Args:
        variation: standard deviation over mean; 1 makes arrivals a Poisson process, more makes
            bursts, and 0 an even beat.
    """
    if variation == 0:
        return (1.0,) * count
    chance = random.Random(f"gaps-{seed}")
    shape = 1 / variation**2
    return tuple(chance.gammavariate(shape, 1 / shape) for _ in range(count))


def arrivals_at(rate_per_s: float, gaps: Sequence[float]) -> tuple[float, ...]:
    """Seconds from the start at which requests arrive, at a mean rate.

    Raises:
        ValueError: the rate is not over 0.
    """
    if not rate_per_s > 0:
        raise ValueError(f"rate_per_s must be over 0, got {rate_per_s}")
    return tuple(accumulate(gap / rate_per_s for gap in gaps))


def arrivals_through(
    phases: Sequence[tuple[float, float]], gaps: Sequence[float]
) -> tuple[float, ...]:
    """Arrivals at rates that change with time, for as long as the phases and the gaps last.

    Args:
        phases: (requests a second, seconds) one after another.
        gaps: with a mean of 1, as `draw_gaps` makes them.
    """
    arrivals: list[float] = []
    ends_at = list(accumulate(rate * seconds for rate, seconds in phases))
    starts_s = [0.0, *accumulate(seconds for _, seconds in phases)]
    # The gaps add up to a clock that counts expected arrivals, and each phase runs it at its rate.
    for clock in accumulate(gaps):
        phase = next((index for index, end in enumerate(ends_at) if clock < end), None)
        if phase is None:
            break
        begun_at = ends_at[phase - 1] if phase else 0.0
        arrivals.append(starts_s[phase] + (clock - begun_at) / phases[phase][0])
    return tuple(arrivals)


def offered_rate_per_s(arrivals: Sequence[float]) -> float:
    """Requests a second from the start to the last arrival."""
    return len(arrivals) / arrivals[-1] if arrivals and arrivals[-1] > 0 else 0.0


def write_trace(file: Path, requests: Iterable[TraceRequest], arrivals: Iterable[float]) -> None:
    """Record a trace: one JSON object a line, with its arrival in `at_s`."""
    pairs = zip(arrivals, requests, strict=True)
    lines = [json.dumps({"at_s": at_s, **asdict(request)}) for at_s, request in pairs]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def read_trace(
    file: Path, mix: Mix = MIXED, seed: int = 0
) -> tuple[tuple[TraceRequest, ...], tuple[float, ...]]:
    """Read a recorded trace. Lines need `at_s` only; what they do not tell is drawn.

    Raises:
        ValueError: a line is no such object, or arrivals go back in time.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = [_read_record(line, number) for number, line in enumerate(lines, 1)]
    arrivals = tuple(float(record.pop("at_s")) for record in records)
    if any(later < earlier for earlier, later in pairwise(arrivals)):
        raise ValueError(f"{file}: at_s must not go back in time")
    drawn = draw_trace(mix, len(records), seed)
    known = TraceRequest.__dataclass_fields__
    requests = tuple(
        replace(request, **{key: value for key, value in record.items() if key in known})
        for request, record in zip(drawn, records, strict=True)
    )
    return requests, arrivals


def _read_record(line: str, number: int) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("at_s"), int | float):
        raise ValueError(f"line {number}: must be a JSON object with a number `at_s`")
    return record


def _draw_request(mix: Mix, chance: random.Random) -> TraceRequest:
    # Everything is drawn whether it is used or not, so that one share does not shift the others.
    is_edit = chance.random() < mix.image_to_image_share
    leaves = chance.random() < mix.cancelled_share
    patience = chance.uniform(0.1, 0.9)
    return TraceRequest(
        # Few prompts come twice: remembered text encodings are no one's advantage.
        prompt=f"{chance.choice(SUBJECTS)} {chance.randrange(10_000)}{chance.choice(BACKGROUNDS)}",
        size=_pick(mix.sizes, chance),
        num_inference_steps=_pick(mix.steps, chance),
        guidance_scale=_pick(mix.guidance_scales, chance),
        scheduler=_pick(mix.schedulers, chance),
        seed=chance.randint(0, MAX_SEED),
        n=_pick(mix.images, chance),
        strength=STRENGTH if is_edit else None,
        cancel_after=patience if leaves else None,
    )


def _pick(weighted: Weighted[T], chance: random.Random) -> T:
    values, weights = zip(*weighted, strict=True)
    chosen: T = chance.choices(values, weights)[0]
    return chosen
