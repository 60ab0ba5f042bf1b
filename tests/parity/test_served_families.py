"""Every family that makes images from a prompt is served: from its folder to the image.

`test_every_family` proves that calls may share forwards. Here the whole way is gone: what a request
asks for becomes the arguments of a call, every task that is offered is done, at other sizes as
well, and the image is the one of the plain pipeline with the same arguments.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families.catalogue import FAMILIES
from families.family import Family, resident
from PIL import Image
from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.guidance import CLASSIC, Guidance, StepWork
from stepserve.domain.models import StepRange
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.facts.guiders import GUIDER_SCALE
from stepserve.pipelines.facts.pipeline_tasks import pipeline_tasks
from stepserve.pipelines.facts.signature import accepted_arguments, read_signature
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.requests import call as tasks
from stepserve.pipelines.requests.call import denoiser_calls, guidance_arguments
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.routing.reports import job_of

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
PERTURBED = tuple(
    f"{name} with perturbed-attention guidance"
    for name in (
        "PixArt-sigma",
        "Sana",
        "Stable Diffusion",
        "Stable Diffusion 3",
        "Stable Diffusion XL",
    )
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
    "FLUX.2 Klein with a key-value cache",
    "Hunyuan-DiT",
    "HunyuanImage",
    "Latent consistency model",
    "Ovis-Image",
    "PixArt-alpha",
    "PixArt-sigma",
    "Qwen-Image",
    "Sana",
    "Sana Sprint",
    "Stable Diffusion",
    "Stable Diffusion 3",
    "Stable Diffusion XL",
    *PERTURBED,
    "StableUnCLIP",
    "Z-Image",
)
# Guidance as an input of the denoiser, or by calling it twice, or thrice the rows at once.
TWICE, EMBEDDED = StepWork(1, 2), StepWork(1, 1)
GUIDANCE_COSTS = {
    "Chroma": TWICE,
    "CogView 4": TWICE,
    "FLUX": EMBEDDED,
    "FLUX.2": EMBEDDED,
    "FLUX.2 Klein": TWICE,
    "FLUX.2 Klein with a key-value cache": EMBEDDED,
    "HunyuanImage": TWICE,
    "Latent consistency model": EMBEDDED,
    "Ovis-Image": TWICE,
    "Qwen-Image": TWICE,
    "Sana Sprint": EMBEDDED,
    **dict.fromkeys(PERTURBED, StepWork(3, 1)),
}
# The distilled Klein takes no guidance at all.
ARGUMENTS = {
    "FLUX.2 Klein with a key-value cache": "",
    "HunyuanImage": GUIDER_SCALE,
    "Qwen-Image": "true_cfg_scale",
}
# Their pipelines take one, or none, and make nothing of it.
NO_NEGATIVE_PROMPT = {
    "FLUX",
    "FLUX.2",
    "FLUX.2 Klein",
    "FLUX.2 Klein with a key-value cache",
    "Latent consistency model",
    "Sana Sprint",
}
TWO_STEPS = {"Sana Sprint"}
NO_PROCESSOR = "its processor cannot be read from a folder without torchvision"
LEFT_OUT = {
    "DreamLite, edit": NO_PROCESSOR,
    "FLUX Kontext": "enlarges what it is given to a million pixels, which takes minutes here",
    "FLUX.2 Klein, with reference images": "the same pipeline, with more than a prompt",
    "FLUX.2, with reference images": "the same pipeline, with more than a prompt",
    "HiDream": "enlarges every image to the area of the native size, which takes a minute here",
    "Hunyuan-DiT with perturbed-attention guidance": "diffusers' call raises without guidance",
    "HunyuanImage, with a guider that skips layers": "the same pipeline, one request at a time",
    "JoyImage-Edit": NO_PROCESSOR,
    "JoyImage-Edit-Plus": NO_PROCESSOR,
    "Kandinsky 5, image": "chooses among sizes of its own, which take a minute here",
    "Kandinsky 3": "divides sizes by a factor that its tiny decoder does not have",
    "LongCat-Image-Edit": NO_PROCESSOR,
    "FLUX.2 Klein with a key-value cache, edit": "it is the same pipeline, given an image",
    "Qwen-Image 2.1": NO_PROCESSOR,
    "Qwen-Image 2.1, edit": NO_PROCESSOR,
    "Lumina Image 2": "divides sizes by a factor that its tiny decoder does not have",
    "Qwen-Image-Edit": NO_PROCESSOR,
    "Qwen-Image-Edit-Plus": NO_PROCESSOR,
    "Stable Cascade, both stages": "diffusers cannot read what it has saved",
    "Stable Diffusion with a LoRA of the UNet": "adapters are loaded by name",
    "Stable Diffusion with a LoRA of the UNet, a scale a request": "adapters are loaded by name",
    "Stable Diffusion with a LoRA of the text encoder, a scale a request": "the same",
    **{
        name: "its adapters lie beside its folder; tests/unit/pipelines/references serves such"
        for name in FAMILIES
        if "IP-Adapter" in name
    },
    "Z-Image Omni": "hands its VAE bfloat16, whatever that computes in",
}
# Tables of positions that end there, or a size that is part of the model.
ONE_SIZE = {
    "AuraFlow",
    "CogView 3 Plus",
    "DeepFloyd IF",
    "Hunyuan-DiT",
    "Stable Diffusion 3",
    "Stable Diffusion 3 with perturbed-attention guidance",
}
# These start from images with fewer steps than they are told to, or with all of them.
OWN_COUNT = {"Latent consistency model", "Sana Sprint"}


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
        files = {"images": (file_of(side_px, "RGB"),), "strength": STRENGTH}
    if task is Task.INPAINTING:
        files["mask"] = file_of(side_px, "L")
    return GenerationRequest(
        id=f"{task}-{side_px}",
        model=limits.id,
        prompt="a red heart",
        width=side_px,
        height=side_px,
        num_inference_steps=limits.steps_of(limits.default_scheduler).nearest(STEPS),
        guidance_scale=limits.default_guidance_scale,
        seed=SEED,
        scheduler=limits.default_scheduler,
        task=task,
        **files,
    )


def served(runner: PipelineRunner, request: GenerationRequest) -> tuple[Image.Image, int]:
    """The image, and how many steps were told of."""
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


def plain(
    folder: Path, request: GenerationRequest, besides: dict[str, Any], guidance: Guidance
) -> Image.Image:
    """What diffusers makes when it is told the same."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        **guidance_arguments(guidance, request),
        "generator": torch.Generator("cpu").manual_seed(SEED),
        **besides,
    }
    arguments = accepted_arguments(read_signature(type(pipeline)), wanted)
    image: Image.Image = pipeline(**arguments)[0][0]
    return image


def assert_router_and_engine_agree(runner: PipelineRunner) -> None:
    """The rows and calls that the router counts are those that the engine runs."""
    limits = runner.capabilities()
    request = replace(a_request(runner, Task.TEXT_TO_IMAGE, limits.sizes.native), id="counted")
    served(runner, request)
    job = job_of(request, limits.guidance)
    forwards = [
        part.rows
        for forward in runner.engine.batcher.view().forwards
        for part in forward.requests
        if part.id == request.id and forward.module.startswith(("unet", "transformer"))
    ]
    assert set(forwards) == {job.rows}
    calls = limits.guidance.calls_of(request, denoiser_calls(runner.model, request))
    # The scheduler of Sana Sprint counts the end of its last step as a timestep.
    assert len(forwards) == calls - (limits.default_scheduler == "SCMScheduler")


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
    runner = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=100))
    runner.start()
    try:
        limits = runner.capabilities()
        assert limits.guidance.argument == ARGUMENTS.get(name, "guidance_scale")
        assert limits.guidance.guided == GUIDANCE_COSTS.get(name, CLASSIC.guided)
        assert limits.guidance.negative_prompt is (name not in NO_NEGATIVE_PROMPT)
        steps_of_default = limits.steps_of(limits.default_scheduler)
        assert (steps_of_default == StepRange(2, 2)) is (name in TWO_STEPS)
        assert_router_and_engine_agree(runner)
        sides = {limits.sizes.native}
        if name not in ONE_SIZE:
            sides.add(limits.sizes.maximum)
        for task in limits.tasks:
            for side_px in sides:
                request = a_request(runner, task, side_px)
                image, steps = served(runner, request)
                assert image.size == (side_px, side_px)
                if name not in OWN_COUNT:
                    assert steps == denoiser_calls(model, request)
        request = a_request(runner, Task.TEXT_TO_IMAGE, limits.sizes.native)
        image, _ = served(runner, request)
    finally:
        runner.stop()
    difference = np.asarray(image, int) - np.asarray(
        plain(tmp_path, request, besides, limits.guidance), int
    )
    assert np.abs(difference).max() <= LEVELS


def test_no_family_is_forgotten() -> None:
    """Those that draw from a prompt alone; tests of other tasks have lists of their own."""
    found = {name for name, family in FAMILIES.items() if draws_from_prompts(resident(family))}
    assert found == {*SERVED, *LEFT_OUT}


def draws_from_prompts(pipeline: Any) -> bool:
    """Whether a request needs to bring nothing but a prompt."""
    cls = type(pipeline)
    return any(
        one.task is Task.TEXT_TO_IMAGE
        and not any(count.least for role, count in one.inputs.items() if role is not Role.PROMPT)
        for one in pipeline_tasks(cls.__name__, read_signature(cls))
    )
