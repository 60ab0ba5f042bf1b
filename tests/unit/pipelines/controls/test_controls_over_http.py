"""A request with a control from HTTP to the image that plain diffusers draws."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_fakes import FakeBackend, client_for
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from stepserve.composition import control_options
from stepserve.config import ModelSettings
from stepserve.domain.events import Outcome
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.controls.preprocessors import preprocess
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_controls import drawing, opened, png, save_controlnet
from tiny_model import NATIVE_PX, UNTRIED, Inbox

BOUND = 2


@pytest.fixture(scope="session")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_controlnet(tmp_path_factory.mktemp("edges"))


@pytest.fixture
def backend(tiny: LoadedModel, edges: Path) -> Iterator[FakeBackend]:
    """Serves with a real model, whose settings are those of an operator."""
    settings = ModelSettings.model_validate(
        {"controls": {"edges": str(edges), "drawing": {"path": str(edges), "preprocessor": "grey"}}}
    )
    runner = PipelineRunner(tiny, sharing=UNTRIED, controls=control_options(settings))
    runner.start()

    async def generate(request: GenerationRequest) -> Outcome:
        inbox = Inbox()
        runner.submit(request, inbox)
        return await asyncio.to_thread(inbox.wait)

    served = FakeBackend()
    served.statuses = [ModelStatus(runner.capabilities(), ready=True)]
    served.generate_with(generate)
    yield served
    runner.stop()


def plain(folder: Path, edges: Path) -> Any:
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=ControlNetModel.from_pretrained(edges)
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "red heart",
        image=drawing(),
        controlnet_conditioning_scale=0.7,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        width=NATIVE_PX,
        height=NATIVE_PX,
    )
    return np.asarray(drawn.images[0], dtype=np.int16)


async def test_a_control_from_http_to_the_plain_image(
    backend: FakeBackend, tiny_folder: Path, edges: Path
) -> None:
    address = f"data:image/png;base64,{base64.b64encode(png(drawing())).decode()}"
    body = {
        "model": "tiny",
        "prompt": "red heart",
        "seed": 5,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "scheduler": "DDIMScheduler",
    }
    control = {"name": "edges", "image": address, "scale": 0.7}
    client = client_for(backend)
    steered, bare = await asyncio.gather(
        client.post("/v1/images/generations", json=body | {"controls": [control]}),
        client.post("/v1/images/generations", json=body),
    )
    assert steered.status_code == bare.status_code == 200, steered.text
    image, other = (
        opened(base64.b64decode(response.json()["data"][0]["b64_json"]))
        for response in (steered, bare)
    )
    assert np.abs(image - plain(tiny_folder, edges)).max() <= BOUND
    assert np.abs(image - other).max() > 10 * BOUND


async def test_a_default_preprocessor_is_used_unless_the_request_says_none(
    backend: FakeBackend,
) -> None:
    address = f"data:image/png;base64,{base64.b64encode(png(drawing())).decode()}"
    grey = preprocess(drawing(), "grey")
    grey_address = f"data:image/png;base64,{base64.b64encode(png(grey)).decode()}"
    client = client_for(backend)
    images = []
    for control in (
        {"name": "drawing", "image": address},
        {"name": "edges", "image": grey_address},
        {"name": "drawing", "image": address, "preprocessor": "none"},
    ):
        body = {"model": "tiny", "prompt": "a", "seed": 1, "num_inference_steps": 2}
        response = await client.post("/v1/images/generations", json=body | {"controls": [control]})
        assert response.status_code == 200, response.text
        images.append(opened(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
