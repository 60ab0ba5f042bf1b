"""Instruction edits, the whole way: from a folder, over HTTP, to the plain pipeline's image."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from families.catalogue import FAMILIES
from families.vision_processors import VisionProcessor
from PIL import Image
from served_model import client_of, running
from stepserve.domain.guidance import Guidance
from stepserve.pipelines.facts.signature import read_signature
from stepserve.pipelines.loading import folders
from stepserve.pipelines.loading.folders import DTYPES, load_model
from stepserve.pipelines.requests import call as calls
from stepserve.pipelines.serving.runner import PipelineRunner

STEPS, SEED, SCALE, LEVELS = 3, 7, 4.5, 2

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """One family, and what requests of it bring along.

    Args:
        name: of the family.
        side_px: of the images that it makes.
        images: sides of the images that each of several requests sends.
        told: what its author's defaults do not fit for a tiny model.
        is_fitted: whether images are resized to the size that is asked for.
        prompt: what is asked for.
        argument: what the call takes the images as.
        reads_images: whether its text encoder sees them, by way of a processor that cannot be read
            from a folder here.
        dtype: that it is loaded in.
        levels: of 255, which rounding explains: half precision rounds by the number of rows.
    """

    name: str
    side_px: int
    images: tuple[tuple[int, ...], ...]
    told: dict[str, Any] = field(default_factory=dict)
    is_fitted: bool = False
    prompt: str = "a red heart"
    argument: str = "image"
    reads_images: bool = False
    dtype: str = "float32"
    levels: int = LEVELS


TRUE_SCALE = "true_cfg_scale"
FLUX_2 = {"max_sequence_length": 16, "text_encoder_out_layers": (1,)}
FLUX = {"max_sequence_length": 16}
IN_JSON = json.dumps({"edit_instruction": "a red heart"})
# The others are slow: `test_served_families.py` takes each of them over HTTP as well.
QUICK = ("FLUX.2, with reference images", "InstructPix2Pix", "Z-Image Omni")
CASES = (
    Case("FLUX.2, with reference images", 16, ((64,), (64, 96), (64, 96)), FLUX_2),
    Case("FLUX.2 Klein, with reference images", 16, ((64,), (80, 64)), FLUX_2),
    Case("FLUX Kontext", 16, ((16,), (24,)), FLUX),
    Case("InstructPix2Pix", 32, ((32,), (40,)), is_fitted=True),
    Case("InstructPix2Pix of Stable Diffusion XL", 32, ((32,), (40,)), is_fitted=True),
    Case("Bria Fibo Edit", 64, ((64,), (64, 48)), prompt=IN_JSON),
    Case("DreamLite, edit", 16, ((16,), (24,)), reads_images=True),
    Case("JoyImage-Edit-Plus", 16, ((16,), (24, 16)), argument="images", reads_images=True),
    Case("LongCat-Image-Edit", 16, ((16,), (24,)), reads_images=True),
    Case("Qwen-Image-Edit", 16, ((16,), (24,)), reads_images=True),
    Case("Qwen-Image-Edit-Plus", 16, ((16,), (24, 16), (24, 16)), reads_images=True),
    # Beside rows of other lengths attention has a mask, and rounds otherwise.
    Case("Z-Image Omni", 16, ((64,), (64, 96), (64, 96)), FLUX, dtype="bfloat16", levels=16),
)


def photo(side_px: int, index: int) -> Image.Image:
    """Of about one colour."""
    generator = torch.Generator().manual_seed(100 * side_px + index)
    values = torch.rand((side_px, side_px, 3), generator=generator).numpy()
    return Image.fromarray((255 * (0.7 * values[:1, :1] + 0.3 * values)).astype(np.uint8))


def file_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save(case: Case, folder: Path) -> Any:
    """Write the folder, and return the pipeline."""
    pipeline = FAMILIES[case.name].build()
    for name, component in pipeline.components.items():
        if isinstance(component, VisionProcessor):
            vars(pipeline)[name] = None
    pipeline.save_pretrained(folder)
    side = case.side_px
    sizes = {"minimum": side, "maximum": 2 * side, "step": side, "native": side}
    (folder / "stepserve.json").write_text(json.dumps({"sizes": sizes}))
    return FAMILIES[case.name].build()


def read_processor(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> None:
    """Hand it to a pipeline that is loaded."""
    own = {n: c for n, c in pipeline.components.items() if isinstance(c, VisionProcessor)}
    usual = folders.loading_arguments
    monkeypatch.setattr(folders, "loading_arguments", lambda *given: {**usual(*given), **own})


def tell(monkeypatch: pytest.MonkeyPatch, told: dict[str, Any]) -> None:
    """Hand these to every call."""
    usual = calls.accepted_arguments
    monkeypatch.setattr(calls, "accepted_arguments", lambda *given: {**usual(*given), **told})


async def edit(client: httpx.AsyncClient, case: Case, index: int) -> Image.Image:
    """Request `index` as a form: several images as OpenAI's clients name them."""
    sides = case.images[index]
    name = "image[]" if len(sides) > 1 else "image"
    files = [(name, (f"{i}.png", file_of(photo(s, i)))) for i, s in enumerate(sides)]
    fields = {
        "prompt": case.prompt,
        "num_inference_steps": str(STEPS + index),
        "seed": str(SEED + index),
        "size": f"{case.side_px}x{case.side_px}",
    }
    response = await client.post("/v1/images/edits", data=fields, files=files, timeout=120)
    assert response.status_code == 200, response.text
    data = response.json()["data"][0]["b64_json"]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def plain(pipeline: Any, case: Case, guidance: Guidance, index: int) -> Image.Image:
    """What diffusers makes of the same."""
    images = [photo(side, i) for i, side in enumerate(case.images[index])]
    if case.is_fitted:
        size = case.side_px, case.side_px
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    scale = {TRUE_SCALE: 4.0} if guidance.argument == TRUE_SCALE else {}
    wanted = {
        case.argument: images if len(max(case.images, key=len)) > 1 else images[0],
        "prompt": case.prompt,
        "negative_prompt": " " if guidance.needs_negative else None,
        "width": case.side_px,
        "height": case.side_px,
        "max_area": case.side_px**2,
        "num_inference_steps": STEPS + index,
        "generator": torch.Generator().manual_seed(SEED + index),
        **scale,
        **case.told,
    }
    accepted = read_signature(type(pipeline)).names
    image: Image.Image = pipeline(**{n: v for n, v in wanted.items() if n in accepted})[0][0]
    return image


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name)
        for case in CASES
    ],
)
def test_edits_over_http_are_the_plain_pipelines(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = save(case, tmp_path)
    tell(monkeypatch, case.told)
    if case.reads_images:
        read_processor(monkeypatch, pipeline)
    with running(load_model("m", tmp_path, case.dtype, "cpu")) as runner:
        limits = runner.capabilities()

        async def edit_all() -> Sequence[Image.Image]:
            async with client_of(runner) as client:
                requests = [edit(client, case, index) for index in range(len(case.images))]
                return await asyncio.gather(*requests)

        images = asyncio.run(edit_all())
    pipeline.to(DTYPES[case.dtype])
    for index, image in enumerate(images):
        wanted = plain(pipeline, case, limits.guidance, index)
        assert image.size == wanted.size == (case.side_px, case.side_px)
        difference = np.asarray(image, int) - np.asarray(wanted, int)
        assert np.abs(difference).max() <= case.levels


@dataclass(frozen=True)
class MaskCase:
    """A family that repaints a part of an image, and how the plain call is told the same.

    Args:
        name: of the family whose folder it is.
        masked: of the family whose pipeline repaints.
        side_px: of all images.
        images: how many.
        strength: None where the task takes none.
        told: as of `Case`.
    """

    name: str
    masked: str
    side_px: int
    images: int
    strength: float | None
    told: dict[str, Any]
    prompt: str = "a red heart"
    mask: str = "mask_image"
    scale: str = "guidance_scale"


MASK_CASES = (
    MaskCase("FLUX Kontext", "FLUX Kontext, inpainting", 16, 1, 0.9, FLUX),
    MaskCase("FLUX Kontext", "FLUX Kontext, inpainting", 16, 2, 0.9, FLUX),
    MaskCase("FLUX.2 Klein", "FLUX.2 Klein, inpainting", 16, 2, 0.9, FLUX_2),
    MaskCase("Bria Fibo Edit", "Bria Fibo Edit", 64, 1, None, {}, IN_JSON, "mask"),
    MaskCase("Qwen-Image-Edit", "Qwen-Image-Edit, inpainting", 16, 1, 0.9, {}, scale=TRUE_SCALE),
)


def right_half(side_px: int) -> Image.Image:
    """White where it is to be painted anew."""
    mask = Image.new("L", (side_px, side_px))
    mask.paste(255, (side_px // 2, 0, side_px, side_px))
    return mask


def masked_plainly(case: MaskCase) -> Image.Image:
    pipeline = FAMILIES[case.masked].build()
    image, *others = [photo(case.side_px, i) for i in range(case.images)]
    size = {"width": case.side_px, "height": case.side_px, "max_area": case.side_px**2}
    wanted = {
        **size,
        "image": image,
        case.mask: right_half(case.side_px),
        "prompt": case.prompt,
        "image_reference": others[0] if others else None,
        "strength": case.strength,
        case.scale: SCALE,
        "negative_prompt": " " if case.scale == TRUE_SCALE else None,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(SEED),
        "_auto_resize": False,
        **case.told,
    }
    accepted = read_signature(type(pipeline)).names
    made: Image.Image = pipeline(**{n: v for n, v in wanted.items() if n in accepted})[0][0]
    return made


@pytest.mark.parametrize("case", MASK_CASES, ids=[f"{c.masked} {c.images}" for c in MASK_CASES])
def test_a_part_is_repainted_over_http(
    case: MaskCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In JSON, with as many images as the family takes beside the mask."""
    read_processor(monkeypatch, save(Case(case.name, case.side_px, ()), tmp_path))
    tell(monkeypatch, case.told)
    body = {
        "prompt": case.prompt,
        "images": [{"image_url": url_of(photo(case.side_px, i))} for i in range(case.images)],
        "mask": {"image_url": url_of(right_half(case.side_px))},
        "guidance_scale": SCALE,
        "num_inference_steps": STEPS,
        "seed": SEED,
        "size": f"{case.side_px}x{case.side_px}",
        **({} if case.strength is None else {"strength": case.strength}),
    }

    async def repaint(runner: PipelineRunner) -> httpx.Response:
        async with client_of(runner) as client:
            return await client.post("/v1/images/edits", json=body, timeout=120)

    with running(load_model("m", tmp_path, "float32", "cpu")) as runner:
        response = asyncio.run(repaint(runner))
    assert response.status_code == 200, response.text
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    difference = np.asarray(image, int) - np.asarray(masked_plainly(case), int)
    assert np.abs(difference).max() <= LEVELS


def test_an_image_that_decides_the_size_is_told_with_the_size_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edits may have other sizes all the same."""
    read_processor(monkeypatch, save(Case("Qwen-Image-Edit", 16, ()), tmp_path))
    body = {"prompt": "a red heart", "image": url_of(photo(16, 0)), "size": "32x32"}
    short = {"num_inference_steps": 2, "seed": SEED}
    masked = {"mask": url_of(right_half(16)), "strength": 1.0}

    async def ask(runner: PipelineRunner) -> list[httpx.Response]:
        async with client_of(runner) as client:
            return [
                await client.post("/v1/images/edits", json=body | short | more, timeout=120)
                for more in ({}, masked)
            ]

    with running(load_model("m", tmp_path, "float32", "cpu")) as runner:
        edited, repainted = asyncio.run(ask(runner))
    assert edited.status_code == repainted.status_code == 200, edited.text + repainted.text
    assert (edited.json()["size"], repainted.json()["size"]) == ("32x32", "16x16")


def url_of(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(file_of(image)).decode()}"


async def error_of(client: httpx.AsyncClient, sides: Sequence[int], **fields: str) -> Any:
    files = [("image[]", (f"{i}.png", file_of(photo(s, i)))) for i, s in enumerate(sides)]
    data = {"prompt": "a red heart", "num_inference_steps": "2", **fields}
    response = await client.post("/v1/images/edits", data=data, files=files, timeout=120)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_images_that_a_model_does_not_take_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CASES[0], tmp_path)
    tell(monkeypatch, FLUX_2)

    async def errors(runner: PipelineRunner) -> list[Any]:
        async with client_of(runner) as client:
            return [
                await error_of(client, [64] * 17),
                await error_of(client, [64] * 11),
                await error_of(client, [64, 16]),
                await error_of(client, [64], strength="0.5"),
                await error_of(client, [64], image_guidance_scale="1.5"),
            ]

    with running(load_model("m", tmp_path, "float32", "cpu")) as runner:
        told = asyncio.run(errors(runner))
    takes = "(it takes: prompt, image (1 to 10))"
    assert [(error["param"], error["message"]) for error in told] == [
        ("image", "image must be 1 to 16 images, got 17"),
        ("image", f"image must be 1 to 10 for edit with model 'm', got 11 {takes}"),
        (
            "image",
            "image is not one that the model takes: Image too small: 16\u00d716. "
            "Both dimensions must be at least 64px",
        ),
        ("strength", f"strength must be left out: edit with model 'm' does not take one {takes}"),
        (
            "image_guidance_scale",
            f"image_guidance_scale must be left out: edit with model 'm' does not take one {takes}",
        ),
    ]


def test_the_scale_of_an_images_guidance_is_heard(tmp_path: Path) -> None:
    case = CASES[3]
    pipeline = save(case, tmp_path)

    async def ask(runner: PipelineRunner, **fields: str) -> httpx.Response:
        files = [("image", ("0.png", file_of(photo(case.side_px, 0))))]
        data = {"prompt": case.prompt, "num_inference_steps": str(STEPS), "seed": str(SEED)}
        async with client_of(runner) as client:
            return await client.post("/v1/images/edits", data=data | fields, files=files)

    with running(load_model("m", tmp_path, "float32", "cpu")) as runner:
        response = asyncio.run(ask(runner, image_guidance_scale="2.5"))
        small = asyncio.run(ask(runner, image_guidance_scale="0.5"))
        unguided = asyncio.run(ask(runner, image_guidance_scale="2.5", guidance_scale="1"))
    told = response.json()
    assert told["parameters"]["image_guidance_scale"] == 2.5
    image = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
    wanted = pipeline(
        prompt=case.prompt,
        image=photo(case.side_px, 0),
        num_inference_steps=STEPS,
        image_guidance_scale=2.5,
        generator=torch.Generator().manual_seed(SEED),
    )[0][0]
    difference = np.asarray(image, int) - np.asarray(wanted, int)
    assert np.abs(difference).max() <= LEVELS
    assert small.json()["error"]["message"] == "image_guidance_scale must be 1 to 30, got 0.5"
    assert unguided.json()["error"]["message"] == (
        "image_guidance_scale has no effect without guidance: set guidance_scale over 1 (got 1), "
        "or leave image_guidance_scale out"
    )
