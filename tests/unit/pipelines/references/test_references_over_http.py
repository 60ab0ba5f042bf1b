"""From a body of JSON to diffusers' own image: the API before a real engine and a tiny model."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_fakes import FakeBackend, client_for
from diffusers import StableDiffusionPipeline
from ip_adapter_weights import save_adapter, tiny_image_encoder, unet_weights
from PIL import Image
from stepserve.composition import load_configured
from stepserve.config import ModelSettings, Settings
from stepserve.domain.events import Outcome
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, Inbox, default_scheduler, tiny_unet

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("style")
    return save_adapter(folder, unet_weights(tiny_unet()), tiny_image_encoder())


@pytest.fixture
def backend(tiny_folder: Path, adapter_folder: Path) -> Iterator[FakeBackend]:
    """Hands requests to an engine whose model was loaded from an operator's settings."""
    settings = ModelSettings.model_validate(
        {
            "path": str(tiny_folder),
            "dtype": "float32",
            "device": "cpu",
            "ip_adapters": {"style": {"path": str(adapter_folder)}},
        }
    )
    options = EngineOptions(max_rows=16, max_pending_images=8)
    runner = PipelineRunner(load_configured("emoji", settings), options, sharing=UNTRIED)
    runner.start()

    async def generate(request: GenerationRequest) -> Outcome:
        inbox = Inbox()
        runner.submit(request, inbox)
        return await asyncio.to_thread(inbox.wait)

    backend = FakeBackend()
    backend.statuses = [ModelStatus(runner.capabilities(), ready=True)]
    backend.generate_with(generate)
    yield backend
    runner.stop()


def photo() -> bytes:
    values = np.random.default_rng(1).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def plain(tiny_folder: Path, adapter_folder: Path, scale: float) -> Any:
    """What diffusers draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipeline.load_ip_adapter(str(adapter_folder), "", "ip-adapter.safetensors")
    pipeline.set_ip_adapter_scale(scale)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = default_scheduler()
    image = pipeline(
        prompt="cat",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        ip_adapter_image=Image.open(io.BytesIO(photo())).convert("RGB"),
    ).images[0]
    return np.asarray(image, dtype=np.int16)


async def test_each_request_gets_the_image_of_its_own_scale(
    backend: FakeBackend, tiny_folder: Path, adapter_folder: Path
) -> None:
    client = client_for(backend, Settings())
    address = f"data:image/png;base64,{base64.b64encode(photo()).decode()}"
    common = {"prompt": "cat", "seed": 7, "num_inference_steps": 3, "guidance_scale": 4.0}
    bodies = [
        common | {"references": [{"image": address, "scale": scale}]} for scale in (0.9, 0.3, 0)
    ]
    responses = await asyncio.gather(*(client.post(PATH, json=body) for body in [*bodies, common]))
    assert [response.status_code for response in responses] == [200] * 4
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))
        for response in responses
        for data in response.json()["data"]
    ]
    for image, scale in zip(images, (0.9, 0.3, 0.0, 0.0), strict=True):
        expected = plain(tiny_folder, adapter_folder, scale)
        assert np.abs(image.astype(np.int16) - expected).max() <= 1
    assert np.abs(images[0].astype(np.int16) - images[3]).max() > 2


async def test_the_model_tells_what_it_takes(backend: FakeBackend) -> None:
    told = (await client_for(backend, Settings()).get("/v1/models/emoji")).json()
    assert told["ip_adapters"] == ["style"]
    for task in ("text-to-image", "image-to-image", "inpainting"):
        assert told["inputs"][task]["references"] == {"least": 0, "most": 8}
