"""Step caches beside "ask for fewer steps": `python -m loadtests.step_cache_bench`.

    python -m loadtests.step_cache_bench [--only quality|speed] [--prompts 12] [--repeats 5]

Quality: images in float32 by solver, steps, method and threshold, and how far each is from the
image of 100 steps; it does not depend on what else the machine does. Speed: many requests at once
through the engine, with a step cache and without, in turns; and what deciding takes. It fails if
one of the goals is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import leave_cores_to_engine, load_model
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner

from loadtests.step_cache.quality import (
    Quality,
    Way,
    as_many_forwards,
    measure,
    rows_of,
    solvers_of,
)
from loadtests.step_cache.speed import measure_deciding, measure_speed

PROMPTS = (
    "red heart",
    "pizza",
    "smiling cat face",
    "green leaf, noto",
    "yellow star",
    "guitar, fluent style",
    "blue car",
    "rocket on a blue background",
    "mushroom",
    "a slice of watermelon",
    "owl, noto",
    "hot air balloon on a white background",
)
DDIM = "DDIMScheduler"
STEPS, FINE_STEPS = 50, 100
THRESHOLDS = {
    StepCacheMethod.EASYCACHE: (0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
    StepCacheMethod.MAGCACHE: (0.01, 0.02, 0.03, 0.04, 0.06, 0.1),
}
FEWER_STEPS = (25, 20, 15, 10)
BEST_SOLVERS = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler")
NOISY_SOLVERS = ("EulerAncestralDiscreteScheduler", "DDPMScheduler")

MOST_FORWARDS = 25
MOST_TIMES_FURTHER = 1.5
LEAST_GAIN = 1.8
MOST_DECIDING = 0.01


@dataclass(frozen=True)
class Goal:
    """Something that is to hold, and what was found."""

    name: str
    found: float
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'MISSED'}: {self.name} ({self.found:.4g})"


def goals_of_quality(whole: Quality, cached: Quality, rivals: Sequence[Quality]) -> list[Goal]:
    """What the quality of a step cache has to reach.

    Args:
        whole: all steps.
        cached: as many steps, some of them skipped.
        rivals: as many forwards on fewer steps.
    """
    best = min(rivals, key=lambda rival: rival.distance)
    further = cached.distance / whole.distance
    return [
        Goal(
            f"{cached.way}: at most {MOST_FORWARDS} forwards",
            cached.forwards,
            cached.forwards <= MOST_FORWARDS,
        ),
        Goal(
            f"{cached.way}: at most {MOST_TIMES_FURTHER} times as far as {whole.way}",
            further,
            further <= MOST_TIMES_FURTHER,
        ),
        Goal(
            f"{cached.way}: closer than {best.way}, the best of as many forwards "
            f"(it is {best.distance:.4f})",
            cached.distance,
            cached.distance < best.distance,
        ),
    ]


def measure_quality(
    runner: PipelineRunner, prompts: Sequence[str]
) -> tuple[list[Quality], list[Goal]]:
    """The whole table, and the goals at the usual threshold of each method."""
    fine, whole, usual = Way(DDIM, FINE_STEPS), Way(DDIM, STEPS), StepCacheUse()
    methods, solvers = runner.model.capabilities.step_cache_methods, solvers_of(runner)
    uses = [StepCacheUse(method, t) for method in methods for t in THRESHOLDS[method]]
    ways = [
        whole,
        *(Way(DDIM, STEPS, use) for use in uses),
        *(Way(DDIM, steps) for steps in FEWER_STEPS),
        *(Way(solver, steps) for solver in BEST_SOLVERS for steps in FEWER_STEPS),
        *(Way(solver, STEPS, use) for solver in solvers for use in (None, usual)),
        *(Way(DDIM, steps, usual) for steps in FEWER_STEPS),
    ]
    found = {quality.way: quality for quality in measure(runner, fine, ways, prompts)}
    goals: list[Goal] = []
    for method in methods:
        cached = found[Way(DDIM, STEPS, StepCacheUse(method, method.usual_threshold))]
        spent = as_many_forwards(solvers, cached.forwards)
        rivals = measure(runner, fine, spent, prompts)
        goals += goals_of_quality(found[whole], cached, rivals)
        found |= {rival.way: rival for rival in rivals}
    return list(found.values()), goals


def measure_noisy(runner: PipelineRunner, prompts: Sequence[str]) -> list[Quality]:
    """Solvers that draw noise at each step, beside their own image of all steps."""
    found = []
    for solver in NOISY_SOLVERS:
        if solver in runner.model.capabilities.schedulers:
            whole, cached = Way(solver, STEPS), Way(solver, STEPS, StepCacheUse())
            found += measure(runner, whole, [cached], prompts)
    return found


@contextmanager
def serving(
    model: Path, dtype: str, threads: int, sharing: SharingOptions
) -> Iterator[PipelineRunner]:
    """An engine on a model of its own."""
    loaded = load_model("model", model, dtype)
    options = EngineOptions(threads=threads, max_pending_images=100_000)
    runner = PipelineRunner(loaded, options, sharing=sharing)
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()


def quality(options: argparse.Namespace) -> list[Goal]:
    """Measure and print the tables."""
    prompts = PROMPTS[: options.prompts]
    with serving(
        options.model, "float32", options.threads, SharingOptions(fixed_rows=False)
    ) as runner:
        table, goals = measure_quality(runner, prompts)
        noisy = measure_noisy(runner, prompts)
    print(f"Distance to {DDIM} with {FINE_STEPS} steps, medians of {len(prompts)} prompts:\n")
    print("\n".join(rows_of(table)))
    print("\nSolvers that draw noise, beside their own image of all steps:\n")
    print("\n".join(rows_of(noisy)), flush=True)
    write(options.out, "quality", [asdict(found) for found in [*table, *noisy]])
    return goals


def speed(options: argparse.Namespace) -> list[Goal]:
    """Measure and print what a step cache gains, and what it costs."""
    way = Way(DDIM, STEPS, StepCacheUse())
    with serving(options.model, options.dtype, options.threads, SharingOptions()) as runner:
        gained = measure_speed(runner, way, PROMPTS, options.requests, options.repeats)
        rows = runner.engine.row_limit
    torch.set_num_threads(options.threads)
    model = load_model("model", options.model, options.dtype)
    deciding = measure_deciding(model, StepCacheUse(), rows)
    print(f"{gained.forwards:.1f} forwards of {STEPS}, {gained.gain:.2f} times the images")
    print(f"deciding: {1e6 * deciding.decide_s:.0f} us of {1e3 * deciding.step_s:.2f} ms")
    write(options.out, "speed", {**asdict(gained), **asdict(deciding)})
    return [
        Goal(f"at least {LEAST_GAIN} times the images", gained.gain, gained.gain >= LEAST_GAIN),
        Goal(
            f"deciding takes at most {MOST_DECIDING:.0%} of a step",
            deciding.share,
            deciding.share <= MOST_DECIDING,
        ),
    ]


def write(folder: Path, name: str, found: object) -> None:
    """As JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-cache-{name}.json").write_text(json.dumps(found, indent=2))


PARTS = {"quality": quality, "speed": speed}


def main() -> None:
    """Measure, print tables and goals; exit with 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="for quality")
    parser.add_argument("--requests", type=int, default=48, help="at once, for speed")
    parser.add_argument("--repeats", type=int, default=5, help="for speed")
    parser.add_argument("--dtype", default="bfloat16", help="for speed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    leave_cores_to_engine()
    parts = [options.only] if options.only else list(PARTS)
    goals = [goal for part in parts for goal in PARTS[part](options)]
    print("\n" + "\n".join(map(str, goals)))
    sys.exit(any(not goal.holds for goal in goals))


if __name__ == "__main__":
    main()
