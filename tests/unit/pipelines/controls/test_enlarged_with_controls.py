"""A control steers both phases of an image that is drawn small and refined large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)
from PIL import Image
from stepserve.domain.events import Failed, Finished
from stepserve.domain.requests import ControlUse, Hires
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_controls import drawing, opened, png, save_controlnet, save_t2i_adapter
from tiny_model import UNTRIED, a_request, submit_all

# Of 255.
BOUND, VISIBLE = 2, 10
TWICE = Hires(scale=2.0, strength=0.5, num_inference_steps=4, width=128, height=128)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    save_controlnet(folder / "edges")
    save_t2i_adapter(folder / "sketch")
    return folder


@pytest.fixture
def steered(tiny: LoadedModel, networks: Path) -> Iterator[PipelineRunner]:
    named = {path.name: ControlSource(path) for path in sorted(networks.iterdir())}
    options = EngineOptions(max_rows=32, max_pending_images=100)
    runner = PipelineRunner(tiny, options, sharing=UNTRIED, controls=ControlOptions(named=named))
    runner.start()
    yield runner
    runner.stop()


def plain(folder: Path, networks: Path) -> Any:
    """Two calls of diffusers' own pipelines with the network, and with one generator."""
    network = ControlNetModel.from_pretrained(networks / "edges")
    draw: Any = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=network)
    refine: Any = StableDiffusionControlNetImg2ImgPipeline(
        **draw.components, requires_safety_checker=False
    )
    generator = [torch.Generator().manual_seed(3)]
    for pipeline in (draw, refine):
        pipeline.scheduler = DDIMScheduler.from_config(draw.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
    common = {"guidance_scale": 4.0, "generator": generator, "num_inference_steps": 4}
    (small,) = draw("red heart", image=drawing(), **common).images
    size, lanczos = (TWICE.width, TWICE.height), Image.Resampling.LANCZOS
    (large,) = refine(
        "red heart",
        image=[small.resize(size, lanczos)],
        control_image=drawing().resize(size, lanczos),
        strength=TWICE.strength,
        controlnet_conditioning_scale=1.0,
        **common,
    ).images
    return np.asarray(large, dtype=np.int16)


def test_a_control_steers_both_phases(
    steered: PipelineRunner, tiny_folder: Path, networks: Path
) -> None:
    controls = (ControlUse("edges", png(drawing())),)
    requests = [
        a_request(id="steered", num_inference_steps=4, hires=TWICE, controls=controls),
        a_request(id="bare", num_inference_steps=4, hires=TWICE),
    ]
    images = []
    for inbox in submit_all(steered, requests):
        outcome = inbox.wait()
        assert isinstance(outcome, Finished), outcome
        images.append(opened(outcome.images[0].data))
    assert np.abs(images[0] - plain(tiny_folder, networks)).max() <= BOUND
    assert np.abs(images[0] - images[1]).max() > VISIBLE


def test_a_control_that_cannot_refine_is_refused_at_once(steered: PipelineRunner) -> None:
    controls = (ControlUse("sketch", png(drawing())),)
    (inbox,) = submit_all(steered, [a_request(hires=TWICE, controls=controls)])
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert "'sketch' is a t2i-adapter" in str(outcome.error)
    assert "not image-to-image" in str(outcome.error)
