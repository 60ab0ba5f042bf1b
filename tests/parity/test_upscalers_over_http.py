"""Upscalers from their folders through HTTP to images, which are those of plain diffusers."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_fakes import SETTINGS, client_for
from diffusers import DiffusionPipeline
from families.catalogue import FAMILIES
from PIL import Image
from running_models import running
from served_families.service import told_besides
from stepserve.domain.tasks import Task
from stepserve.pipelines.facts.signature import accepted_arguments, read_signature
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.probing.probe_requests import probe_request, run_probe
from stepserve.pipelines.requests import call as calls

LEVELS = 2
URL = "/v1/images/upscale"
# Factor, side of the image, most noise.
UPSCALERS = {
    "DeepFloyd IF, super-resolution": (4, 8, 999),
    "Latent diffusion super-resolution": (2, 32, None),
    "Stable Diffusion latent upscaler": (2, 16, None),
    "Stable Diffusion upscaler": (2, 16, 90),
}
SENT = SETTINGS.model_copy(
    update={
        "http": SETTINGS.http.model_copy(
            update={"max_body_bytes": 10**6, "max_upload_bytes": 10**6}
        )
    }
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def an_image(side_px: int, shade: int) -> Image.Image:
    slope = Image.linear_gradient("L").point(lambda value: (value + shade) % 256)
    return slope.convert("RGB").resize((side_px, side_px))


def address_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bodies(limits: Any, side_px: int) -> list[dict[str, Any]]:
    """Two requests that differ in all that they may say."""
    sent: list[dict[str, Any]] = []
    for index in range(2):
        body: dict[str, Any] = {
            "model": "tiny",
            "image": address_of(an_image(side_px, 80 * index)),
            "num_inference_steps": 3 + index,
            "seed": 7 + index,
        }
        if "prompt" in limits.inputs_of(limits.usual_task):
            body |= {"prompt": "a red heart" if index else "", "guidance_scale": 4.0}
        if index and limits.max_noise_level is not None:
            body["noise_level"] = 21
        sent.append(body)
    return sent


def plain(folder: Path, body: dict[str, Any], side_px: int, index: int, besides: Any) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = {
        **body,
        "image": an_image(side_px, 80 * index),
        "width": 4 * side_px,
        "height": 4 * side_px,
        "generator": torch.Generator("cpu").manual_seed(body["seed"]),
        **besides,
    }
    return pipeline(**accepted_arguments(read_signature(type(pipeline)), wanted))[0][0]


@pytest.mark.parametrize("name", UPSCALERS)
async def test_an_upscaler_is_served_from_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor, side_px, most_noise = UPSCALERS[name]
    family = FAMILIES[name]
    pipeline = family.build()
    pipeline.save_pretrained(tmp_path)
    besides = told_besides(family, pipeline)

    def accepted(signature: Any, wanted: Any) -> dict[str, Any]:
        taken = {key: value for key, value in besides.items() if signature.accepts(key)}
        return accepted_arguments(signature, wanted) | taken

    monkeypatch.setattr(calls, "accepted_arguments", accepted)
    with running(tmp_path) as (runner, backend):
        limits = runner.capabilities()
        assert (limits.upscale_factor, limits.max_noise_level) == (factor, most_noise)
        sent = bodies(limits, side_px)
        async with client_for(backend, SENT) as client:
            responses = await asyncio.gather(*(client.post(URL, json=body) for body in sent))
        forwards = runner.engine.batcher.view().forwards
    shared = [f for f in forwards if f.module.startswith("unet") and len(f.requests) == 2]
    assert shared
    for index, (body, response) in enumerate(zip(sent, responses, strict=True)):
        told = response.json()
        assert response.status_code == 200, told
        assert told["size"] == f"{factor * side_px}x{factor * side_px}"
        assert told["parameters"].get("noise_level") == body.get(
            "noise_level", limits.default_noise_level
        )
        image = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
        wanted = plain(tmp_path, body, side_px, index, besides)
        difference = np.asarray(image, int) - np.asarray(wanted, int)
        assert np.abs(difference).max() <= LEVELS


def test_latent_diffusion_makes_arrays_of_its_images_so_it_is_loaded_in_float32(tmp_path: Path):
    FAMILIES["Latent diffusion super-resolution"].build().save_pretrained(tmp_path)
    model = load_model("larger", tmp_path, device="cpu")
    request = probe_request(model, Task.UPSCALING, 0, model.capabilities.sizes.minimum)
    with torch.no_grad():
        image = run_probe(model, request)
    assert image.shape[-1] == request.width
    assert bool(image.isfinite().all())
