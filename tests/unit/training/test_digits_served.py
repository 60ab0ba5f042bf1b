"""A trained DDPM of pixels, served: each request as the plain pipeline draws it, in one batch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import ConsistencyModelPipeline
from few_vectors import few_vectors
from PIL import Image
from stepserve.domain.events import Event, Finished, StepFinished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import ONE, Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_digits import CLASS_NAMES, SIDE_PX
from tiny_model import submit_all

# numpy's word to torch, by way of diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
# Rows of one forward differ from a forward of one row by rounding.
LEVELS = 1
REQUESTS = (
    ("DDPMScheduler", 1000, 0),
    ("DDIMScheduler", 10, 1),
    ("DDIMScheduler", 50, 0),
    ("DPMSolverMultistepScheduler", 10, 1),
    ("DPMSolverMultistepScheduler", 50, 1),
)


@pytest.fixture(scope="module")
def runner(trained_digits: Path) -> Iterator[PipelineRunner]:
    model = load_model("digits", trained_digits / "model", device="cpu")
    runner = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=64))
    with few_vectors():
        runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def plain(trained_digits: Path) -> ConsistencyModelPipeline:
    pipeline = ConsistencyModelPipeline.from_pretrained(trained_digits / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def requests_of(runner: PipelineRunner) -> list[GenerationRequest]:
    usual = runner.capabilities().usual_request("r")
    return [
        replace(
            usual,
            id=f"{scheduler}-{steps}",
            scheduler=scheduler,
            num_inference_steps=steps,
            class_label=label,
            seed=seed,
        )
        for seed, (scheduler, steps, label) in enumerate(REQUESTS)
    ]


def served(event: Event) -> npt.NDArray[np.int64]:
    assert isinstance(event, Finished), event
    return np.asarray(Image.open(io.BytesIO(event.images[0].data))).astype(int)


def drawn_by(
    pipeline: ConsistencyModelPipeline, request: GenerationRequest
) -> npt.NDArray[np.int64]:
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    image = pipeline(
        class_labels=request.class_label,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    return np.asarray(image).astype(int)


def test_ancestral_sampling_ddim_and_dpm_solver_share_a_batch(
    runner: PipelineRunner, plain: ConsistencyModelPipeline
) -> None:
    requests = requests_of(runner)
    inboxes = submit_all(runner, requests)
    outcomes = [inbox.wait() for inbox in inboxes]

    steps = [sum(isinstance(event, StepFinished) for event in inbox.events) for inbox in inboxes]
    assert steps == [1000, 10, 50, 10, 50]
    shares = [outcome.timings.batch_share for outcome in outcomes if isinstance(outcome, Finished)]
    # The short ones had others beside them at nearly every step.
    assert max(shares[1:]) < 0.6
    for request, outcome in zip(requests, outcomes, strict=True):
        assert np.abs(served(outcome) - drawn_by(plain, request)).max() <= LEVELS, request.id


def test_its_classes_have_names_and_its_images_no_colours(runner: PipelineRunner) -> None:
    capabilities = runner.capabilities()
    assert dict(capabilities.tasks) == {Task.CLASS_TO_IMAGE: {Role.CLASS_LABEL: ONE}}
    assert [capabilities.classes.numbers_of(name) for name in CLASS_NAMES] == [[0], [1]]
    assert capabilities.default_scheduler == "DPMSolverMultistepScheduler"
    image = served(submit_all(runner, requests_of(runner)[1:2])[0].wait())
    assert image.shape == (SIDE_PX, SIDE_PX)
