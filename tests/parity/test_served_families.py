"""Every family that makes pictures from a prompt is served: from its folder to the picture.

`test_every_family` proves that calls may share forwards. Here the whole way is gone: what a request
asks for becomes the arguments of a call, every task that is offered is done, at other sizes as
well, and the picture is the one of the plain pipeline with the same arguments.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families.catalogue import FAMILIES
from families.family import Family
from PIL import Image

from service.domain.events import Event, Failed, Finished, StepFinished
from service.domain.requests import GenerationRequest, Task
from service.engine.engine import EngineOptions
from service.pipelines import tasks
from service.pipelines.capabilities import check_serves_prompts
from service.pipelines.errors import ModelLoadError
from service.pipelines.guided_steps import CLASSIC, GuidedStep
from service.pipelines.load import load_model
from service.pipelines.runner import PipelineRunner
from service.pipelines.signature import accepted_arguments, read_signature
from service.pipelines.tasks import denoiser_calls

STEPS, STRENGTH, SEED = 4, 0.5, 1
LEVELS = 2
# What tiny models need to be told, as their authors' defaults are for large ones.
FOR_TINY = (
    "clean_caption",
    "complex_human_instruction",
    "max_sequence_length",
    "prior_num_inference_steps",
    "text_encoder_out_layers",
    "use_resolution_binning",
)
SERVED = (
    "AuraFlow",
    "Bria",
    "Chroma",
    "CogView 3 Plus",
    "CogView 4",
    "DeepFloyd IF",
    "FLUX",
    "FLUX.2",
    "FLUX.2 Klein",
    "Hunyuan-DiT",
    "Latent consistency model",
    "Ovis-Image",
    "PixArt-alpha",
    "PixArt-sigma",
    "Qwen-Image",
    "Sana",
    "Stable Diffusion",
    "Stable Diffusion 3",
    "Stable Diffusion XL",
    "Stable Diffusion with perturbed-attention guidance",
    "StableUnCLIP",
    "Z-Image",
)
# Guidance as an input of the denoiser, or by calling it twice, or thrice the rows at once.
GUIDED_STEPS = {
    "Chroma": GuidedStep(rows=1, calls=2),
    "CogView 4": GuidedStep(rows=1, calls=2),
    "FLUX": GuidedStep(rows=1, calls=1),
    "FLUX.2": GuidedStep(rows=1, calls=1),
    "FLUX.2 Klein": GuidedStep(rows=1, calls=2),
    "Latent consistency model": GuidedStep(rows=1, calls=1),
    "Ovis-Image": GuidedStep(rows=1, calls=2),
    "Qwen-Image": GuidedStep(rows=1, calls=1),
    "Stable Diffusion with perturbed-attention guidance": GuidedStep(rows=3, calls=1),
}
LEFT_OUT = {
    "FLUX Kontext": "enlarges what it is given to a million pixels, which takes minutes here",
    "HiDream": "enlarges every picture to the area of the native size, which takes a minute here",
    "Kandinsky 5, image": "chooses among sizes of its own, which take a minute here",
    "Kandinsky 3": "divides sizes by a factor that its tiny decoder does not have",
    "Lumina Image 2": "divides sizes by a factor that its tiny decoder does not have",
    "Sana Sprint": "more than two steps need one more argument",
    "Stable Cascade, both stages": "diffusers cannot read what it has saved",
    "Stable Diffusion with a LoRA of the UNet": "adapters are loaded by name",
    "Stable Diffusion with a LoRA of the UNet, a scale a request": "adapters are loaded by name",
    "Stable Diffusion with a LoRA of the text encoder, a scale a request": "the same",
    "Stable Diffusion with an IP-Adapter": "requests bring no pictures of that kind",
}
# Tables of positions that end there, or a size that is part of the model.
ONE_SIZE = {"AuraFlow", "CogView 3 Plus", "DeepFloyd IF", "Hunyuan-DiT", "Stable Diffusion 3"}
# These start from pictures with fewer steps than they are told to, or with all of them.
OWN_COUNT = {"Latent consistency model"}


pytestmark = pytest.mark.usefixtures("one_thread")


def told_besides(family: Family, pipeline: Any) -> dict[str, Any]:
    arguments = family.arguments(pipeline, family.variations(1)[0])
    return {name: arguments[name] for name in FOR_TINY if name in arguments}


def save(family: Family, folder: Path) -> Any:
    """Write the folder, and return the pipeline; sizes are said where tiny models have others."""
    pipeline = family.build()
    pipeline.save_pretrained(folder)
    arguments = family.arguments(pipeline, family.variations(1)[0])
    if side := arguments.get("height"):
        sizes = {"minimum": side, "maximum": 2 * side, "step": side, "native": side}
        (folder / "stepserve.json").write_text(json.dumps({"sizes": sizes}))
    return pipeline


def file_of(side_px: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side_px, side_px)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def a_request(runner: PipelineRunner, task: Task, side_px: int) -> GenerationRequest:
    limits = runner.capabilities()
    files: dict[str, Any] = {}
    if task is not Task.TEXT_TO_IMAGE:
        files = {"image": file_of(side_px, "RGB"), "strength": STRENGTH}
    if task is Task.INPAINTING:
        files["mask_image"] = file_of(side_px, "L")
    return GenerationRequest(
        id=f"{task}-{side_px}",
        model=limits.id,
        prompt="a red heart",
        width=side_px,
        height=side_px,
        num_inference_steps=STEPS,
        guidance_scale=limits.default_guidance_scale,
        seed=SEED,
        scheduler=limits.default_scheduler,
        task=task,
        **files,
    )


def served(runner: PipelineRunner, request: GenerationRequest) -> tuple[Image.Image, int]:
    """The picture, and how many steps were told of."""
    events: SimpleQueue[Event] = SimpleQueue()
    runner.submit(request, events.put)
    steps = 0
    while True:
        event = events.get(timeout=120)
        steps += isinstance(event, StepFinished)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return Image.open(io.BytesIO(event.images[0].data)), steps


def plain(folder: Path, request: GenerationRequest, besides: dict[str, Any]) -> Image.Image:
    """What diffusers makes when it is told the same."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(SEED),
        **besides,
    }
    arguments = accepted_arguments(read_signature(type(pipeline)), wanted)
    picture: Image.Image = pipeline(**arguments)[0][0]
    return picture


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SERVED)
def test_a_family_is_served_from_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    besides = told_besides(family, save(family, tmp_path))

    def accepted(signature: Any, wanted: Any) -> dict[str, Any]:
        taken = {name: value for name, value in besides.items() if signature.accepts(name)}
        return accepted_arguments(signature, wanted) | taken

    monkeypatch.setattr(tasks, "accepted_arguments", accepted)
    model = load_model("m", tmp_path, "float32", "cpu")
    runner = PipelineRunner(model, EngineOptions(max_rows=8, max_waiting_pictures=100))
    runner.start()
    try:
        assert runner.guided_step == GUIDED_STEPS.get(name, CLASSIC)
        limits = runner.capabilities()
        sides = {limits.sizes.native}
        if name not in ONE_SIZE:
            sides.add(limits.sizes.maximum)
        for task in limits.tasks:
            for side_px in sides:
                request = a_request(runner, task, side_px)
                picture, steps = served(runner, request)
                assert picture.size == (side_px, side_px)
                if name not in OWN_COUNT:
                    assert steps == denoiser_calls(model, request)
        request = a_request(runner, Task.TEXT_TO_IMAGE, limits.sizes.native)
        picture, _ = served(runner, request)
    finally:
        runner.stop()
    difference = np.asarray(picture, int) - np.asarray(plain(tmp_path, request, besides), int)
    assert np.abs(difference).max() <= LEVELS


def test_no_family_is_forgotten() -> None:
    """Those that draw from a prompt alone, as `load_model` sees it."""
    found = set()
    for name, family in FAMILIES.items():
        pipeline_class = type(family.build())
        with contextlib.suppress(ModelLoadError):
            check_serves_prompts(pipeline_class, read_signature(pipeline_class))
            found.add(name)
    assert found == {*SERVED, *LEFT_OUT}
