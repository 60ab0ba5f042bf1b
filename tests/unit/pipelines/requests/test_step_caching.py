"""Which denoiser calls of a request its step cache skips, where magnitudes decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest, Hires
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.hires import calls_of_phases
from stepserve.pipelines.requests.step_caching import step_cache_of
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.step_cache.schedule import skipped_calls
from tiny_model import UNTRIED, a_request, submit_all

MAGNITUDES = tuple(1.02**call for call in range(20))
MAGCACHE = StepCacheUse(StepCacheMethod.MAGCACHE, 0.1)
STEPS = 12


@pytest.fixture
def calibrated(tiny: LoadedModel) -> LoadedModel:
    methods = tuple(StepCacheMethod)
    capabilities = replace(tiny.capabilities, step_cache_methods=methods)
    return replace(tiny, capabilities=capabilities, magnitudes=MAGNITUDES)


@pytest.fixture
def calibrated_runner(calibrated: LoadedModel) -> Iterator[PipelineRunner]:
    made = PipelineRunner(calibrated, EngineOptions(max_rows=16), sharing=UNTRIED)
    made.start()
    yield made
    made.stop()


def a_cached(**changes: Any) -> GenerationRequest:
    return a_request(**{"num_inference_steps": STEPS, "step_cache": MAGCACHE} | changes)


def skipped(model: LoadedModel, request: GenerationRequest) -> list[frozenset[int] | None]:
    cache = step_cache_of(model, request, calls_of_phases(model, request))
    assert cache is not None
    return [phase.skipped for phase in cache.phases]


def test_magnitudes_decide_beforehand(calibrated: LoadedModel) -> None:
    expected = skipped_calls(MAGNITUDES, STEPS, 0.1)

    assert expected
    assert skipped(calibrated, a_cached()) == [expected]


def test_a_request_with_another_method_decides_as_it_goes(calibrated: LoadedModel) -> None:
    assert skipped(calibrated, a_cached(step_cache=StepCacheUse())) == [None]


def test_both_calls_of_a_step_of_a_solver_are_skipped(calibrated: LoadedModel) -> None:
    (steps,) = skipped(calibrated, a_cached(scheduler="HeunDiscreteScheduler"))

    # One timestep less than two a step, as the last step takes one.
    expected = skipped_calls(MAGNITUDES, STEPS, 0.1)
    assert steps == frozenset(2 * step + stage for step in expected for stage in (0, 1))
    assert max(steps) < 2 * STEPS - 3


def test_what_begins_with_an_image_has_the_magnitudes_of_its_part(calibrated: LoadedModel) -> None:
    # Over the threshold everywhere but in the second half.
    halved = (*(1.5**-call for call in range(10)), *(1.5**-10 for _ in range(10)))
    model = replace(calibrated, magnitudes=halved)
    request = a_cached(
        num_inference_steps=2 * STEPS, strength=0.5, task=Task.IMAGE_TO_IMAGE, images=(b"",)
    )

    assert skipped(model, request) == [skipped_calls([1.0, 1.0], STEPS, 0.1)]
    assert skipped(model, replace(request, strength=1.0)) != [skipped_calls([1.0, 1.0], 24, 0.1)]


def test_each_phase_has_its_own(calibrated: LoadedModel) -> None:
    refined = Hires(2.0, 0.5, 16, 128, 128)
    drawn, enlarged = skipped(calibrated, a_cached(hires=refined))

    assert drawn == skipped_calls(MAGNITUDES, STEPS, 0.1)
    assert enlarged == skipped_calls(MAGNITUDES, 8, 0.1, begin=0.5)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_as_many_calls_run_as_are_left(
    calibrated: LoadedModel, calibrated_runner: PipelineRunner, scheduler: str
) -> None:
    request = a_cached(scheduler=scheduler)
    (inbox,) = submit_all(calibrated_runner, [request])
    outcome = inbox.wait()

    assert isinstance(outcome, Finished)
    (asked,) = calls_of_phases(calibrated, request)
    (steps,) = skipped(calibrated, request)
    assert steps
    assert outcome.timings.denoiser_calls == asked
    assert outcome.timings.denoiser_calls_skipped == len(steps)
