"""What guidance costs is seen, not assumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_model import UNTRIED, a_request

from service.domain.models import ModelCapabilities
from service.pipelines.guided_steps import CLASSIC, GuidedStep, measure_guided_step
from service.pipelines.load import LoadedModel
from service.pipelines.runner import PipelineRunner

GUIDED, UNGUIDED = {"guidance_scale": 4.0, "n": 3}, {"guidance_scale": 1.0, "n": 3}


@pytest.mark.parametrize(
    ("step", "rows", "calls"),
    [(CLASSIC, 6, 10), (GuidedStep(1, 1), 3, 10), (GuidedStep(1, 2), 3, 20)],
)
def test_only_guided_requests_cost_more(step: GuidedStep, rows: int, calls: int) -> None:
    guided, unguided = a_request(**GUIDED), a_request(**UNGUIDED)
    assert (step.rows_of(guided), step.calls_of(guided, 10)) == (rows, calls)
    assert (step.rows_of(unguided), step.calls_of(unguided, 10)) == (3, 10)


def changed(model: LoadedModel, **changes: object) -> LoadedModel:
    capabilities: ModelCapabilities = replace(model.capabilities, **changes)
    return replace(model, capabilities=capabilities)


def test_a_pipeline_that_stacks_both_rows_is_seen_to(tiny: LoadedModel) -> None:
    assert measure_guided_step(tiny) == CLASSIC


def test_where_nothing_can_be_seen_it_is_taken_to_be_as_usual(tiny: LoadedModel) -> None:
    assert measure_guided_step(changed(tiny, default_guidance_scale=1.0)) == CLASSIC
    assert measure_guided_step(changed(tiny, default_scheduler="NoSuchScheduler")) == CLASSIC


def test_the_engine_is_told(tiny: LoadedModel) -> None:
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    runner.guided_step = GuidedStep(rows=1, calls=2)
    request = a_request(**GUIDED, num_inference_steps=5)
    work = runner._work(request, lambda event: None)
    assert (work.rows, work.steps) == (3, 10)
