"""Requests of a model whose guider holds the guidance scale: each gets its own, at once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from diffusers import HunyuanImagePipeline
from families.catalogue import FAMILIES
from PIL import Image
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.guidance import StepWork
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.facts.guiders import GUIDER_SCALE
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner

LEVELS = 2
SIZE = 16
SCALES = (1.5, 2.0, 6.0, 12.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guided")
    FAMILIES["HunyuanImage"].build().save_pretrained(path)
    sizes = '{"minimum": 16, "maximum": 16, "step": 16, "native": 16}'
    (path / "stepserve.json").write_text(f'{{"sizes": {sizes}}}')
    return path


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[PipelineRunner]:
    model = load_model("guided", folder, "float32", "cpu")
    served = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=100))
    served.start()
    yield served
    served.stop()


def request(runner: PipelineRunner, scale: float) -> GenerationRequest:
    limits = runner.capabilities()
    return GenerationRequest(
        id=f"scale-{scale}",
        model=limits.id,
        prompt="a red heart",
        negative_prompt="a bad image",
        width=SIZE,
        height=SIZE,
        num_inference_steps=4,
        guidance_scale=scale,
        seed=1,
        scheduler=limits.default_scheduler,
    )


def plain(folder: Path, scale: float) -> np.ndarray:
    """As diffusers makes it, whose user puts another guider into the pipeline."""
    pipeline = HunyuanImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guider = pipeline.guider.new(guidance_scale=scale)
    image = pipeline(
        prompt="a red heart",
        negative_prompt="a bad image",
        width=SIZE,
        height=SIZE,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]
    return np.asarray(image, int)


def image_of(events: SimpleQueue[Event]) -> np.ndarray:
    while True:
        event = events.get(timeout=120)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return np.asarray(Image.open(io.BytesIO(event.images[0].data)), int)


def test_requests_of_several_scales_share_forwards_and_get_the_guider_of_each(
    runner: PipelineRunner, folder: Path
) -> None:
    limits = runner.capabilities()
    assert limits.guidance.argument == GUIDER_SCALE
    assert limits.default_guidance_scale == 3.5
    answers: dict[float, SimpleQueue[Event]] = {scale: SimpleQueue() for scale in SCALES}
    for scale, events in answers.items():
        runner.submit(request(runner, scale), events.put)
    images = {scale: image_of(events) for scale, events in answers.items()}
    for scale, image in images.items():
        assert np.abs(image - plain(folder, scale)).max() <= LEVELS
    assert np.abs(images[2.0] - images[12.0]).max() > 10 * LEVELS
    forwards = runner.engine.batcher.view().forwards
    assert max(len(forward.requests) for forward in forwards) > 1


def test_a_scale_of_one_turns_guidance_off(runner: PipelineRunner) -> None:
    """Also that of a guider that goes on with a scale of another kind in later steps."""
    events: SimpleQueue[Event] = SimpleQueue()
    runner.submit(replace(request(runner, 1.0), negative_prompt=""), events.put)
    image_of(events)
    assert runner.capabilities().guidance.unguided == StepWork(1, 1)
    mine = [
        part
        for forward in runner.engine.batcher.view().forwards
        for part in forward.requests
        if part.id == "scale-1.0" and forward.module.startswith("transformer")
    ]
    assert len(mine) == 4


def test_who_asks_for_no_scale_gets_the_authors(runner: PipelineRunner, folder: Path) -> None:
    usual = runner.capabilities().default_guidance_scale
    events: SimpleQueue[Event] = SimpleQueue()
    runner.submit(replace(request(runner, usual), id="usual"), events.put)
    assert np.abs(image_of(events) - plain(folder, 3.5)).max() <= LEVELS
