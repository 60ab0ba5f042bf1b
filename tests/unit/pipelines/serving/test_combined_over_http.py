"""Controls, references, LoRA adapters and all else that a request may ask for, in one request.

All requests are sent at once to one tiny model, and each gets what plain diffusers draws.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from ip_adapter_weights import save_adapter, tiny_image_encoder, unet_weights
from PIL import Image
from served_model import client_of
from stepserve.composition import control_options, load_configured
from stepserve.config import ModelSettings
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.speed import is_channels_last
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_adapters import load_plain, with_adapters
from tiny_adapters import save_adapter as save_lora
from tiny_controls import drawing, png, save_controlnet, save_t2i_adapter
from tiny_model import default_scheduler, tiny_unet

# Of 255.
LEVELS, VISIBLE = 2, 10
STEPS, GUIDANCE_SCALE, STRENGTH, PREVIEWS = 4, 4.0, 0.75, 2
CONTROL_SCALE, REFERENCE_SCALE, LORA_SCALE = 0.7, 0.5, 0.5
PROMPTS = ("red heart", "blue cat")
SMALL, LARGE = (64, 64), (96, 96)
MASK = Image.new("L", SMALL)
MASK.paste(255, (0, 0, 32, 64))


@dataclass(frozen=True)
class Asked:
    """What a request combines."""

    control: bool = False
    reference: bool = False
    lora: bool = False
    hires: bool = False
    image: bool = False
    mask: bool = False
    guidance_end: float = 1.0
    n: int = 1
    previews: int = 0
    prompts: bool = False
    reproducible: bool = False

    @property
    def url(self) -> str:
        return f"/v1/images/{'edits' if self.image else 'generations'}"

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "tiny",
            "seed": 5,
            "n": self.n,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "guidance_end": self.guidance_end,
            "scheduler": "DDIMScheduler",
            "reproducible": self.reproducible,
        }
        body |= {"prompts": list(PROMPTS)} if self.prompts else {"prompt": PROMPTS[0]}
        if self.control:
            control = {"name": "edges", "image": address(drawing(1)), "scale": CONTROL_SCALE}
            body["controls"] = [control]
        if self.reference:
            body["references"] = [{"image": address(drawing(2)), "scale": REFERENCE_SCALE}]
        if self.lora:
            body["adapters"] = [{"name": "ink", "scale": LORA_SCALE}]
        if self.hires:
            body["hires"] = {"scale": LARGE[0] / SMALL[0], "strength": STRENGTH}
        if self.image:
            body |= {"image": address(drawing(3)), "strength": STRENGTH}
        if self.mask:
            body["mask"] = address(MASK)
        if self.previews:
            body |= {"stream": True, "previews": self.previews}
        return body


STEERED = {
    "control": {"control": True},
    "reference": {"reference": True},
    "control, reference": {"control": True, "reference": True},
}
BESIDES: Mapping[str, dict[str, Any]] = {
    "": {},
    "LoRA": {"lora": True},
    "hires": {"hires": True},
    "hires, LoRA": {"hires": True, "lora": True},
    "image": {"image": True},
    "mask": {"image": True, "mask": True},
    "interval": {"guidance_end": 0.5},
    "n": {"n": 3},
    "previews": {"previews": PREVIEWS},
    "prompts": {"prompts": True},
    "reproducible": {"reproducible": True},
    "image, interval, n": {"image": True, "guidance_end": 0.5, "n": 3},
    "mask, LoRA, previews": {"image": True, "mask": True, "lora": True, "previews": PREVIEWS},
    "hires, interval, n, previews": {
        "hires": True,
        "guidance_end": 0.5,
        "n": 2,
        "previews": PREVIEWS,
    },
    "hires, LoRA, prompts, n": {"hires": True, "lora": True, "prompts": True, "n": 2},
}
ASKED = {
    ", ".join(filter(None, (one, other))): Asked(**steered, **more)
    for one, steered in STEERED.items()
    for other, more in BESIDES.items()
} | {
    "nothing": Asked(),
    "LoRA, hires": Asked(lora=True, hires=True),
    "LoRA, image, n": Asked(lora=True, image=True, n=3),
}


def address(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


@dataclass(frozen=True)
class Files:
    """Where a model and what steers it lie."""

    model: Path
    lora: Path
    controls: Path
    ip_adapter: Path


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("combined")
    torch.manual_seed(0)
    adapter = save_adapter(folder / "style", unet_weights(tiny_unet()), tiny_image_encoder())
    save_controlnet(folder / "controls" / "edges")
    save_t2i_adapter(folder / "controls" / "sketch")
    (folder / "adapters").mkdir()
    lora = save_lora(
        folder / "adapters" / "ink.safetensors", tiny_folder, 1, text_encoder=["q_proj"]
    )
    return Files(tiny_folder, lora, folder / "controls", adapter)


@pytest.fixture(scope="module")
def served(files: Files) -> Iterator[PipelineRunner]:
    """From the settings of an operator."""
    named = {path.name: str(path) for path in sorted(files.controls.iterdir())}
    settings = ModelSettings.model_validate(
        {
            "path": str(files.model),
            "dtype": "float32",
            "device": "cpu",
            "ip_adapters": {"style": {"path": str(files.ip_adapter)}},
            "controls": named,
        }
    )
    runner = PipelineRunner(
        load_configured("tiny", settings),
        EngineOptions(max_rows=16, max_pending_images=200, threads=1),
        AdapterOptions(folder=files.lora.parent),
        controls=control_options(settings),
    )
    runner.start()
    yield runner
    runner.stop()


Answers = dict[str, list[bytes]]


async def ask(runner: PipelineRunner, asked: Asked) -> list[bytes]:
    """The files of a response, previews first."""
    async with client_of(runner) as client:
        response = await client.post(asked.url, json=asked.body)
    assert response.status_code == 200, response.text
    if not asked.previews:
        told = response.json()["data"]
    else:
        lines = response.text.splitlines()
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
        told = [json.loads(event) for event in events]
    return [base64.b64decode(entry["b64_json"]) for entry in told]


@pytest.fixture(scope="module")
def together(served: PipelineRunner) -> Answers:
    """All at once, as tests wait for each."""

    async def all_of_them() -> list[list[bytes]]:
        return await asyncio.gather(*(ask(served, asked) for asked in ASKED.values()))

    return dict(zip(ASKED, asyncio.run(all_of_them()), strict=True))


PLAIN = {
    (False, "image"): StableDiffusionImg2ImgPipeline,
    (False, "mask"): StableDiffusionInpaintPipeline,
    (True, ""): StableDiffusionControlNetPipeline,
    (True, "image"): StableDiffusionControlNetImg2ImgPipeline,
    (True, "mask"): StableDiffusionControlNetInpaintPipeline,
}


@cache
def plain_parts(files: Files, reference: bool, lora: bool) -> Any:
    pipeline = load_plain(files.model)
    if reference:
        pipeline.load_ip_adapter(str(files.ip_adapter), "", "ip-adapter.safetensors")
        pipeline.set_ip_adapter_scale(REFERENCE_SCALE)
    if lora:
        with_adapters(pipeline, [files.lora]).set_adapters("plain0", LORA_SCALE)
    pipeline.scheduler = default_scheduler()
    return pipeline


def plain_pipeline(files: Files, asked: Asked, start: str) -> Any:
    """diffusers' own class for the task, with a scheduler of its own."""
    whole = plain_parts(files, asked.reference, asked.lora)
    if not asked.control and not start:
        pipeline = copy.copy(whole)
    else:
        network = ControlNetModel.from_pretrained(files.controls / "edges")
        more = {"controlnet": network} if asked.control else {}
        cls = PLAIN[asked.control, start]
        pipeline = cls(**whole.components, requires_safety_checker=False, **more)
        pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = copy.deepcopy(whole.scheduler)
    return pipeline


def plain_call(
    files: Files, asked: Asked, prompt: str, generators: Any, images: list[Image.Image]
) -> list[Image.Image]:
    """One call of diffusers, from noise where there are no images."""
    start = "mask" if asked.mask and images else "image" if images else ""
    pipeline = plain_pipeline(files, asked, start)
    size = images[0].size if images else SMALL
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "num_images_per_prompt": asked.n,
        "generator": generators,
    }
    if images:
        arguments |= {"image": images, "strength": STRENGTH}
    if start == "mask":
        arguments |= {"mask_image": MASK}
    if asked.control:
        control = "control_image" if images else "image"
        arguments[control] = drawing(1).resize(size, Image.Resampling.LANCZOS)
        arguments["controlnet_conditioning_scale"] = CONTROL_SCALE
    if asked.reference:
        arguments["ip_adapter_image"] = drawing(2)
    limit = limiting_guidance(asked.guidance_end, int(STEPS * STRENGTH) if images else STEPS)
    handle = pipeline.unet.register_forward_hook(limit)
    try:
        made: list[Image.Image] = pipeline(**arguments).images
    finally:
        handle.remove()
    return made


def limiting_guidance(end: float, calls: int) -> Callable[..., Any]:
    """Makes both halves of what a UNet gives that with the prompt, from a share of its calls on."""
    count = itertools.count()

    def hook(unet: Any, args: Any, output: Any) -> Any:
        if next(count) / calls < end:
            return output
        return (torch.cat([output[0].chunk(2)[1]] * 2),)

    return hook


def plain_images(files: Files, asked: Asked) -> list[Image.Image]:
    """Of each prompt in turn."""
    made: list[Image.Image] = []
    for index, prompt in enumerate(PROMPTS if asked.prompts else PROMPTS[:1]):
        seed = 5 + index * asked.n
        generators = [torch.Generator().manual_seed(seed + i) for i in range(asked.n)]
        start = [drawing(3)] if asked.image else []
        images = plain_call(files, asked, prompt, generators, start)
        if asked.hires:
            large = [image.resize(LARGE, Image.Resampling.LANCZOS) for image in images]
            images = plain_call(files, asked, prompt, generators, large)
        made += images
    return made


def levels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.mark.parametrize("name", ASKED)
def test_each_gets_what_plain_diffusers_draws(name: str, together: Answers, files: Files) -> None:
    asked = ASKED[name]
    wanted = plain_images(files, asked)
    previews, finished = together[name][: -len(wanted)], together[name][-len(wanted) :]
    assert len(previews) == asked.previews * asked.n
    for data, image in zip(finished, wanted, strict=True):
        made = Image.open(io.BytesIO(data))
        assert made.size == (LARGE if asked.hires else SMALL)
        assert np.abs(levels(made) - levels(image)).max() <= LEVELS


@pytest.mark.parametrize("name", ASKED)
async def test_each_gets_alone_what_it_got_among_the_others(
    name: str, served: PipelineRunner, together: Answers
) -> None:
    assert served.capabilities().same_bytes
    assert await ask(served, ASKED[name]) == together[name]


def test_all_that_is_combined_shows(together: Answers) -> None:
    """Or one that is left out would go unseen where both leave it out."""
    alike = [
        a for name, a in ASKED.items() if not (a.previews or a.prompts or a.hires or a.reproducible)
    ]
    images = {
        asked: levels(Image.open(io.BytesIO(together[name][0])))
        for name, asked in ASKED.items()
        if asked in alike and asked.n == 1
    }
    for one, image in images.items():
        for other, another in images.items():
            assert one == other or np.abs(image - another).max() > VISIBLE, (one, other)


@pytest.mark.usefixtures("together")
def test_networks_lie_in_memory_as_the_denoiser_does(served: PipelineRunner) -> None:
    """What they give has one format then, whichever formats the latents of a forward have."""
    networks = [loaded.network for loaded in served.controls._loaded.values()]
    assert networks
    assert all(is_channels_last(module) for module in [*networks, served.model.pipeline.unet])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": True}, "references: they cannot be combined with 'sketch'"),
        ({"hires": True}, "not image-to-image"),
        ({"image": True}, "not image-to-image"),
        ({"image": True, "mask": True}, "not inpainting"),
        ({"control": True}, "cannot be combined"),
    ],
)
async def test_what_cannot_be_combined_is_refused(
    changes: dict[str, bool], said: str, served: PipelineRunner
) -> None:
    asked = Asked(**changes)
    body = asked.body
    body["controls"] = [*body.get("controls", ()), {"name": "sketch", "image": address(drawing(1))}]
    async with client_of(served) as client:
        response = await client.post(asked.url, json=body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
