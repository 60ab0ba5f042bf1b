"""Every family that draws and refines also does both in one request, as two plain calls do.

From its folder to the image: two requests at once, which differ in seed, prompt and number of
images, share forwards in both phases.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from families.catalogue import FAMILIES
from few_vectors import few_vectors
from PIL import Image
from served_families.service import save_sized, tell, told_besides
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.requests import GenerationRequest, Hires
from stepserve.domain.tasks import Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.facts.signature import accepted_arguments, read_signature
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.requests.call import guidance_arguments
from stepserve.pipelines.serving.runner import PipelineRunner

LEVELS = 2
REFINING = (
    "FLUX",
    "Latent consistency model",
    "Qwen-Image",
    "Stable Diffusion",
    "Stable Diffusion XL",
    "Stable Diffusion with perturbed-attention guidance",
    "Z-Image",
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def a_request(model: LoadedModel, index: int) -> GenerationRequest:
    limits = model.capabilities
    small, large = limits.sizes.minimum, 2 * limits.sizes.minimum
    return replace(
        limits.usual_request(f"r{index}", Task.TEXT_TO_IMAGE),
        prompt=("a red heart", "a big apple")[index],
        width=small,
        height=small,
        num_inference_steps=3 + index,
        seed=7 + 10 * index,
        n=2 - index,
        hires=Hires(2.0, 0.5, 4, large, large),
    )


def plain(
    folder: Path, model: LoadedModel, request: GenerationRequest, besides: dict[str, Any]
) -> list[Image.Image]:
    """What diffusers makes when it is called for the one and then for the other."""
    draw: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    refine: Any = AutoPipelineForImage2Image.from_pipe(draw)
    generators = [torch.Generator("cpu").manual_seed(request.seed + i) for i in range(request.n)]
    images: list[Image.Image] = []
    for part, pipeline in zip(request.phases, (draw, refine), strict=True):
        pipeline.set_progress_bar_config(disable=True)
        size = part.width, part.height
        wanted = {
            "prompt": part.prompt,
            "width": part.width,
            "height": part.height,
            "num_inference_steps": part.num_inference_steps,
            "num_images_per_prompt": part.n,
            "generator": generators,
            "image": [image.resize(size, Image.Resampling.LANCZOS) for image in images],
            "strength": part.strength,
            **guidance_arguments(model.capabilities.guidance, part),
            **besides,
        }
        images = list(pipeline(**accepted_arguments(read_signature(type(pipeline)), wanted))[0])
    return images


@pytest.mark.parametrize("name", REFINING)
def test_a_family_enlarges_what_it_drew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    besides = told_besides(family, save_sized(family, tmp_path))
    tell(monkeypatch, besides)
    model = load_model("m", tmp_path, "float32", "cpu")
    runner = PipelineRunner(model, EngineOptions(max_rows=16, max_pending_images=100))
    with few_vectors():
        runner.start()
    try:
        requests = [a_request(runner.model, index) for index in range(2)]
        assert Role.HIRES in runner.capabilities().inputs_of(Task.TEXT_TO_IMAGE)
        events: SimpleQueue[Event] = SimpleQueue()
        for request in requests:
            runner.submit(request, events.put)
        ended: dict[str, Finished] = {}
        while len(ended) < len(requests):
            event = events.get(timeout=120)
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                ended[event.request_id] = event
        shared = [
            forward
            for forward in runner.engine.batcher.view().forwards
            if forward.module.startswith((family.denoiser, "unet")) and len(forward.requests) == 2
        ]
    finally:
        runner.stop()
    assert shared
    for request in requests:
        wanted = plain(tmp_path, model, request, besides)
        assert len(wanted) == request.n
        for file, image in zip(ended[request.id].images, wanted, strict=True):
            served = np.asarray(Image.open(io.BytesIO(file.data)), int)
            assert served.shape[:2] == (request.phases[1].height, request.phases[1].width)
            assert np.abs(served - np.asarray(image, int)).max() <= LEVELS
