"""Requests that skip steps get what the same rule gives in a plain loop outside the engine.

`plain_step_cache.py` has that loop. In float64 the images are equal to rounding, and the calls that
run are the same; alone, when nothing is stacked, images are equal in every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from families.catalogue import FAMILIES, VIDEOS
from plain_step_cache import Decision
from step_cache_cases import Bench
from stepserve.pipelines.probing.sharing_check import difference

FLOAT64_BOUND, FLOAT32_BOUND = 1e-9, 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A family, what it is an example of, and a threshold at which some steps are skipped.

    Where the engine fills texts up, even a request alone is equal to rounding only.
    """

    example: str
    family: str
    threshold: float
    scheduler: str = ""
    steps: int = 12
    fills_texts: bool = False


CASES = (
    Case("guidance in one call, UNet", "Stable Diffusion", 0.1, "DDIMScheduler"),
    Case("solver that begins twice at one timestep", "Stable Diffusion XL", 0.2, "PNDMScheduler"),
    Case("two calls a step", "Stable Diffusion", 0.2, "HeunDiscreteScheduler"),
    Case("two calls a step", "Stable Diffusion", 0.2, "KDPM2DiscreteScheduler"),
    Case("guidance in one call, transformer", "Stable Diffusion 3", 0.1),
    Case("guidance in two calls", "Qwen-Image", 0.2, fills_texts=True),
    Case("guidance embedded", "FLUX", 0.1),
    Case("control, UNet", "Stable Diffusion with a ControlNet", 0.1),
    Case("control, transformer", "FLUX with a ControlNet", 0.1),
    Case("control, guidance in two calls", "Qwen-Image with a ControlNet", 0.2, fills_texts=True),
    Case("image to image", "Stable Diffusion, image to image", 0.1, steps=14),
    Case("inpainting", "Stable Diffusion, inpainting", 0.1),
    Case("image to image, transformer", "FLUX, image to image", 0.1, steps=14),
    Case("lists of rows", "Z-Image", 0.4),
    Case("adapter", "Stable Diffusion with a LoRA of the UNet", 0.1),
    Case("key-value cache", "FLUX.2 Klein with a key-value cache, edit", 0.8),
    Case("key-value cache of a prompt", "Qwen-Image 2.1", 1.0),
)


IDS = [" ".join(filter(None, (case.family, case.scheduler))) for case in CASES]
# Each has a sibling that is an example of the same.
SIBLINGS = {"FLUX, image to image", "Stable Diffusion KDPM2DiscreteScheduler"}
# Some steps of each kind that runs always are among these.
SCHEDULE = Decision(None, frozenset({0, 4, 6, 7, 8, 10, 11, 13, 14, 15, 18, 19, 22}))
SCHEDULED = ("Stable Diffusion HeunDiscreteScheduler", "Qwen-Image with a ControlNet", "Z-Image")
LADDER = (0.002, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# A guider that calls more often at some steps than at others.
IRREGULAR = "HunyuanImage, with a guider that skips layers"
# Two denoisers, each with a scheduler, of which the loop around one knows nothing.
TWO_DENOISERS = {"Stable Cascade, both stages", "StableUnCLIP"}
OTHERS = sorted(
    FAMILIES.keys() - {case.family for case in CASES} - VIDEOS - TWO_DENOISERS - {IRREGULAR}
)


def bench_of(case: Case, dtype: torch.dtype = torch.float64) -> Bench:
    family = FAMILIES[case.family]
    return Bench(family, family.build().to(dtype), case.scheduler, case.steps)


def check_alone(bench: Bench, decision: Decision, bound: float = 0.0) -> None:
    """The plain call with the same rule around it."""
    variation = bench.variation()
    plain = bench.cached(variation, decision)
    track, recorder = bench.track("alone", variation, bench.step_cache(variation, decision))
    forwards = bench.served([track])
    assert recorder.error is None
    assert tuple(forwards) == plain.calls
    assert difference(recorder.result, plain.image) <= bound


def check_at_once(bench: Bench, decisions: Sequence[Decision | None], bound: float) -> None:
    """Requests that arrive one after another, each with a decision of its own or none."""
    requests = []
    for index, decision in enumerate(decisions):
        variation = bench.variation(index)
        plain, cache = bench.whole(variation), None
        if decision is not None:
            cache = bench.step_cache(variation, decision)
            plain = bench.plainly(variation, decision, len(plain.ran))
        requests.append((plain, *bench.track(f"request-{index}", variation, cache)))
    forwards = bench.served([track for _, track, _ in requests])
    for plain, _, recorder in requests:
        assert recorder.error is None
        denoiser = [call for call in plain.calls if call[0] == bench.denoiser]
        assert recorder.timings.denoiser_calls_run == len(denoiser)
        assert difference(plain.image, recorder.result) <= bound
    assert len(forwards) < sum(len(plain.calls) for plain, *_ in requests)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.slow if name in SIBLINGS else ())
        for name, case in zip(IDS, CASES, strict=True)
    ],
)
def test_the_same_steps_are_skipped_and_the_image_is_the_same(case: Case) -> None:
    bench = bench_of(case)
    decision = Decision(case.threshold)
    check_alone(bench, decision, FLOAT64_BOUND if case.fills_texts else 0.0)
    check_at_once(bench, [decision, None, Decision(2 * case.threshold)], FLOAT64_BOUND)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_skips_what_it_says_but_for_what_always_runs(name: str) -> None:
    bench = bench_of(CASES[IDS.index(name)])
    check_alone(bench, SCHEDULE, FLOAT64_BOUND)
    check_at_once(bench, [SCHEDULE, None, Decision(0.4)], FLOAT64_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.fills_texts], ids=lambda case: case.family
)
def test_single_precision_and_half_keep_every_bit(case: Case, dtype: torch.dtype) -> None:
    check_alone(bench_of(case, dtype), Decision(case.threshold))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_family_skips_the_same_steps(name: str) -> None:
    family = FAMILIES[name]
    bench = Bench(family, family.build())
    whole = bench.whole(bench.variation())
    for threshold in LADDER:
        ran = bench.plainly(bench.variation(), Decision(threshold), len(whole.ran)).ran
        if any(ran[3:-1]) and not all(ran):
            break
    check_alone(bench, Decision(threshold), FLOAT32_BOUND)


@pytest.mark.slow
def test_nothing_is_skipped_once_steps_differ_in_their_calls() -> None:
    family = FAMILIES[IRREGULAR]
    bench = Bench(family, family.build())
    variation = bench.variation()
    whole, cache = bench.whole(variation), bench.step_cache(variation, Decision(1.0))
    track, recorder = bench.track("irregular", variation, cache)
    assert tuple(bench.served([track])) == whole.calls
    assert torch.equal(recorder.result, whole.image)
