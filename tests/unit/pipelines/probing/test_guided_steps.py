"""How a model takes guidance, and what that costs, is seen, not assumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import Accepted, Failed, Finished
from stepserve.domain.guidance import CLASSIC, Guidance, GuidanceKind, StepWork
from stepserve.domain.models import ModelCapabilities
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import GenerationRequest, Hires
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.probing.guidance_cost import find_guidance, with_probed_guidance
from stepserve.pipelines.probing.probed_tasks import with_probed_steps, with_probed_tasks
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.requests.input_decoding import Inputs
from stepserve.pipelines.serving.listener import RequestListener, track_of
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.ray_serve.replica.request_tracker import RequestTracker
from stepserve.routing.reports import Report, job_of
from tiny_families import save_tiny_flux, save_tiny_sd3
from tiny_model import UNTRIED, Inbox, a_request, changed_call

EMBEDDED = Guidance("guidance_scale", 1.0, False, False, StepWork(), StepWork())
TRUE_CFG = Guidance("true_cfg_scale", 1.0, True, True, StepWork(1, 2), StepWork())
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SIDE_PX = 128


def load(folder: Path) -> LoadedModel:
    return load_model("tiny", folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(save_tiny_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """FLUX without the input for guidance: its `guidance_scale` changes nothing."""
    folder = tmp_path_factory.mktemp("schnell")
    return load(save_tiny_flux(folder, guidance_embeds=False))


@pytest.mark.parametrize(
    ("step", "rows", "calls"),
    [(StepWork(2, 1), 6, 10), (StepWork(1, 1), 3, 10), (StepWork(1, 2), 3, 20)],
)
def test_only_guided_requests_cost_more(step: StepWork, rows: int, calls: int) -> None:
    guidance = replace(CLASSIC, guided=step)
    guided, unguided = a_request(guidance_scale=4.0, n=3), a_request(guidance_scale=1.0, n=3)
    assert (guidance.rows_of(guided), guidance.calls_of(guided, 10)) == (rows, calls)
    assert (guidance.rows_of(unguided), guidance.calls_of(unguided, 10)) == (3, 10)


def test_a_pipeline_that_stacks_both_rows_is_seen_to(tiny: LoadedModel) -> None:
    assert find_guidance(tiny) == CLASSIC
    assert CLASSIC.kind is GuidanceKind.CLASSIFIER_FREE


def test_guidance_as_an_input_costs_nothing_and_takes_no_negative_prompt(flux: LoadedModel) -> None:
    assert find_guidance(flux) == EMBEDDED
    assert EMBEDDED.kind is GuidanceKind.EMBEDDED


def test_guidance_that_only_a_negative_prompt_turns_on(schnell: LoadedModel) -> None:
    settled = with_probed_guidance(schnell).capabilities
    assert settled.guidance == TRUE_CFG
    # As the signature of the pipeline has it.
    assert settled.default_guidance_scale == 1.0
    assert settled.max_guidance_scale > 1


def test_the_verdict_is_the_same_again(flux: LoadedModel, schnell: LoadedModel) -> None:
    assert [find_guidance(flux), find_guidance(schnell)] == [EMBEDDED, TRUE_CFG]


class NoGuidance:
    """A call that takes the arguments of guidance and makes nothing of them."""

    def __call__(self, *args: Any, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
        kwargs.pop("negative_prompt", None)
        return super().__call__(*args, guidance_scale=1.0, **kwargs)  # type: ignore[misc]


def test_a_pipeline_that_ignores_guidance_is_said_to_take_none(tiny: LoadedModel) -> None:
    settled = with_probed_guidance(changed_call(tiny, NoGuidance)).capabilities
    assert settled.guidance.kind is GuidanceKind.NONE
    assert not settled.guidance.negative_prompt
    assert (settled.default_guidance_scale, settled.max_guidance_scale) == (1.0, 1.0)


def test_where_nothing_can_be_seen_the_signature_is_believed(tiny: LoadedModel) -> None:
    capabilities: ModelCapabilities = replace(tiny.capabilities, default_scheduler="NoSuch")
    assert find_guidance(replace(tiny, capabilities=capabilities)) == CLASSIC


def flow_request(**changes: Any) -> GenerationRequest:
    usual = {"scheduler": SCHEDULER, "width": SIDE_PX, "height": SIDE_PX, "guidance_scale": 3.5}
    return a_request(**(usual | changes))


def started(model: LoadedModel) -> PipelineRunner:
    """A runner that tried what its model does, but not how rows may share."""
    runner = PipelineRunner(
        with_probed_tasks(with_probed_guidance(with_probed_steps(model))),
        EngineOptions(max_rows=8, max_pending_images=64, threads=1),
        sharing=SharingOptions(plan=SharingPlan()),
    )
    runner.start()
    return runner


@pytest.fixture(scope="module")
def flux_runner(flux: LoadedModel) -> Iterator[PipelineRunner]:
    runner = started(flux)
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def schnell_runner(schnell: LoadedModel) -> Iterator[PipelineRunner]:
    runner = started(schnell)
    yield runner
    runner.stop()


def image(runner: PipelineRunner, request: GenerationRequest) -> bytes:
    inbox = Inbox()
    runner.submit(request, inbox)
    outcome = inbox.wait()
    assert isinstance(outcome, Finished), outcome
    return outcome.images[0].data


def refusal(runner: PipelineRunner, request: GenerationRequest) -> InvalidRequestError:
    inbox = Inbox()
    runner.submit(request, inbox)
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    return outcome.error


def test_a_negative_prompt_that_would_be_ignored_is_refused(flux_runner: PipelineRunner) -> None:
    error = refusal(flux_runner, flow_request(negative_prompt="big apple"))
    assert error.field == "negative_prompt"
    assert "has no effect on model 'tiny'" in error.message
    assert "prompt" in error.message
    image(flux_runner, flow_request())


def test_guidance_and_a_negative_prompt_have_the_effect_that_is_told(
    schnell_runner: PipelineRunner,
) -> None:
    made = [
        image(schnell_runner, flow_request(id=str(i), guidance_scale=scale, negative_prompt=text))
        for i, (scale, text) in enumerate([(1, ""), (4, ""), (7, ""), (4, "big apple")])
    ]
    assert len(set(made)) == 4
    error = refusal(schnell_runner, flow_request(guidance_scale=1.0, negative_prompt="big apple"))
    assert "without guidance: set guidance_scale over 1 (got 1)" in error.message


class DenoiserForwards:
    """Rows of each denoiser forward, as the engine reports it."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward_ended(self, report: ForwardReport) -> None:
        if report.stage == "denoise":
            self.rows.append(report.rows)

    def request_ended(self, report: EndReport) -> None:
        pass


async def report_while_in_flight(runner: PipelineRunner, request: GenerationRequest) -> Report:
    """What the routers are told of a replica that has accepted a request and not begun it."""
    tracker, begin, reports = RequestTracker(runner), threading.Event(), []
    held = threading.Thread(target=runner.engine.call, args=(begin.wait,))
    held.start()
    async for event in tracker.submit(request):
        if isinstance(event, Accepted):
            reports.append(tracker.report())
            begin.set()
    held.join()
    (report,) = reports
    return report


@pytest.mark.parametrize("name", ["flux_runner", "schnell_runner"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
async def test_the_router_counts_what_the_engine_runs(
    name: str, scale: float, request: pytest.FixtureRequest
) -> None:
    """Guided FLUX takes one row an image, as guidance is an input of its denoiser."""
    runner: PipelineRunner = request.getfixturevalue(name)
    forwards = DenoiserForwards()
    runner.engine.observe(forwards)
    wanted = flow_request(id=f"{name}-{scale}", guidance_scale=scale, n=2, num_inference_steps=3)
    report = await report_while_in_flight(runner, wanted)
    (told,) = report.jobs
    # What a router expects before it has sent the request.
    assert told == job_of(wanted, report.guidance)
    assert forwards.rows == [told.rows] * told.steps
    if name == "flux_runner":
        assert (told.rows, told.steps) == (2, 3)


async def test_the_router_counts_both_sizes_of_a_request_that_is_enlarged(
    flux_runner: PipelineRunner,
) -> None:
    forwards = DenoiserForwards()
    flux_runner.engine.observe(forwards)
    sizes = flux_runner.capabilities().sizes
    wanted = flow_request(
        id="enlarged",
        width=sizes.minimum,
        height=sizes.minimum,
        num_inference_steps=3,
        hires=Hires(2.0, 0.5, 4, 2 * sizes.minimum, 2 * sizes.minimum),
    )
    report = await report_while_in_flight(flux_runner, wanted)
    (told,) = report.jobs
    assert told == job_of(wanted, report.guidance)
    assert [part.steps for part in told.parts] == [3, 2]
    assert forwards.rows == [told.rows] * told.all_steps
    assert {part.size for part in told.parts} <= told_sizes(flux_runner)


def told_sizes(runner: PipelineRunner) -> set[str]:
    return set(RequestTracker(runner).report().costs or {})


def test_the_engine_is_told(tiny: LoadedModel) -> None:
    guidance = replace(CLASSIC, guided=StepWork(rows=1, calls=2))
    model = replace(tiny, capabilities=replace(tiny.capabilities, guidance=guidance))
    runner = PipelineRunner(model, sharing=UNTRIED)
    asked = a_request(n=3, num_inference_steps=5)
    listener = RequestListener(asked, lambda event: None, runner._encoder, Inputs(asked))
    track = track_of(model, runner.adapters, runner.controls, asked, listener)
    assert (track.rows, track.steps) == (3, 10)


def test_other_tasks_take_guidance_as_images_from_a_prompt_do(
    flux: LoadedModel, tiny: LoadedModel, tmp_path: Path
) -> None:
    """It is tried with images from a prompt only."""
    for model in (flux, tiny, load(save_tiny_sd3(tmp_path))):
        for task in model.factory.tasks:
            names = model.factory.signature(task).names
            promised = model.capabilities.guidance
            assert promised.argument in names
            assert ("negative_prompt" in names) is promised.negative_prompt
