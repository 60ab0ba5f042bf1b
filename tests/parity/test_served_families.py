"""Every family that makes images, from its folder and over HTTP to the plain pipeline's image.

`test_every_family` proves that calls may share forwards. Here the whole way is gone: a folder is
loaded as `stepserve serve` loads it, with all that is found out before serving; requests come in
over the real HTTP application; and the images of the responses are the plain pipeline's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from families.catalogue import FAMILIES
from families.family import resident
from parity_cases import Forwards
from PIL import Image
from served_families.calls import HttpCall
from served_families.reaches import FROM_TEXT, REACHES, TRIED_ELSEWHERE, UNREACHED
from served_families.requests import body_of, plain_image, variations_of
from served_families.service import ServedFamily, images_of, post_at_once, serve
from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.guidance import CLASSIC, StepWork
from stepserve.domain.models import StepRange
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.pipelines.facts.guiders import GUIDER_SCALE
from stepserve.pipelines.facts.signature import read_signature
from stepserve.pipelines.probing.probe_requests import with_required_inputs
from stepserve.pipelines.requests.call import denoiser_calls
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.routing.reports import job_of

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
STEPS, STRENGTH, SEED = 4, 0.5, 1
LEVELS = 2
TRIES = 3
# They draw sizes of their own choice, enlarge every image to the area of the native size, or divide
# sizes by a factor that their tiny decoders do not have.
OTHER_SIZES = {"HiDream", "Kandinsky 5, image", "Lumina Image 2"}
LONG = {"HiDream", "HunyuanImage", "Kandinsky 3", "Kandinsky 5, image", "StableUnCLIP"}
# Each has a sibling here, or in `test_upscalers_over_http`, with the same denoiser or the same
# network beside it, and one with the same kind of body. `test_every_family` tries them all.
SIBLINGS = {
    "DDIM",
    "DeepFloyd IF",
    "FLUX Kontext, inpainting",
    "FLUX with a union ControlNet",
    "FLUX, image to image",
    "FLUX, inpainting",
    "FLUX.2 Klein with a key-value cache",
    "FLUX.2 Klein, inpainting",
    "FLUX.2 Klein, with reference images",
    "FLUX.2, with reference images",
    "Hunyuan-DiT with a ControlNet",
    "HunyuanImage, with a guider that skips layers",
    "InstructPix2Pix of Stable Diffusion XL",
    "JoyImage-Edit",
    "Latent diffusion, unconditional",
    "PNDM",
    "PixArt-alpha",
    "Qwen-Image with a ControlNet",
    "Qwen-Image, image to image",
    "Qwen-Image, inpainting",
    "Qwen-Image-Edit, inpainting",
    "Qwen-Image-Edit-Plus",
    "Sana with a ControlNet",
    "Sana with perturbed-attention guidance",
    "Stable Diffusion 3 with perturbed-attention guidance",
    "Stable Diffusion 3, image to image",
    "Stable Diffusion 3, inpainting",
    "Stable Diffusion XL with a ControlNet",
    "Stable Diffusion XL with a T2I-Adapter",
    "Stable Diffusion XL with an IP-Adapter",
    "Stable Diffusion XL with perturbed-attention guidance",
    "Stable Diffusion XL, image to image",
    "Stable Diffusion XL, inpainting",
    "Stable Diffusion with a ControlNet, image to image",
    "Stable Diffusion with a ControlNet, inpainting",
    "Stable Diffusion with a LoRA of the UNet",
    "Stable Diffusion with an IP-Adapter",
    "Z-Image, image to image",
}
# Guidance as an input of the denoiser, or by calling it twice, or thrice the rows at once.
TWICE, EMBEDDED, THRICE_THE_ROWS = StepWork(1, 2), StepWork(1, 1), StepWork(3, 1)
GUIDANCE_COSTS = {
    "Chroma": TWICE,
    "CogView 4": TWICE,
    "FLUX": EMBEDDED,
    "FLUX.2": EMBEDDED,
    "FLUX.2 Klein": TWICE,
    "FLUX.2 Klein with a key-value cache": EMBEDDED,
    "HunyuanImage": TWICE,
    "HunyuanImage, with a guider that skips layers": TWICE,
    "Kandinsky 5, image": TWICE,
    "Latent consistency model": EMBEDDED,
    "Lumina Image 2": TWICE,
    "Ovis-Image": TWICE,
    "Qwen-Image": TWICE,
    "Sana Sprint": EMBEDDED,
    **{name: THRICE_THE_ROWS for name in REACHES if name.endswith("perturbed-attention guidance")},
}
# The distilled Klein takes no guidance at all.
ARGUMENTS = {
    "FLUX.2 Klein with a key-value cache": "",
    "HunyuanImage": GUIDER_SCALE,
    "HunyuanImage, with a guider that skips layers": GUIDER_SCALE,
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
# Tables of positions that end there, or a size that is part of the model.
ONE_SIZE = {
    "AuraFlow",
    "CogView 3 Plus",
    "DeepFloyd IF",
    "Hunyuan-DiT",
    # It divides sizes by a factor that its tiny decoder does not have.
    "Kandinsky 3",
    "Stable Diffusion 3",
    "Stable Diffusion 3 with perturbed-attention guidance",
}
# These start from images with fewer steps than they are told to, or with all of them.
OWN_COUNT = {"Latent consistency model", "Sana Sprint"}
# Its guider asks for a third prediction at some steps, which one cost for all steps does not say.
OTHER_CALLS = {"HunyuanImage, with a guider that skips layers"}
OTHER_SECOND_IMAGE = {
    # diffusers itself fails at two images of one prompt.
    "DreamLite, edit",
    # One image is encoded, with noise of the first seed: its prompt means each of a list.
    "Qwen-Image-Edit, inpainting",
}


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def parameters(reaches: dict[str, HttpCall]) -> list[Any]:
    """Names as pytest takes them; those that take long, or have a sibling, are marked."""
    marks = {name: [pytest.mark.slow] for name in LONG | SIBLINGS}
    return [pytest.param(name, id=name, marks=marks.get(name, ())) for name in reaches]


@pytest.fixture(scope="module", params=parameters(REACHES))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedFamily]:
    folder = tmp_path_factory.mktemp("family")
    with serve(FAMILIES[request.param], REACHES[request.param], folder) as family:
        yield family


async def test_mixed_requests_share_forwards_and_get_the_plain_images(
    served: ServedFamily,
) -> None:
    forwards = Forwards()
    served.runner.engine.observe(forwards)
    variations = variations_of(served)
    bodies = [body_of(served, one) for one in variations]
    for response, variation in zip(await post_at_once(served, bodies), variations, strict=True):
        (image,) = images_of(response)
        assert_equal(image, plain_image(served, variation))
    if not served.family.shares:
        assert not forwards.were_shared
        return
    for _ in range(TRIES):
        # By what forwards seem to cost on a busy machine, one may be left to run alone.
        if not forwards.were_shared:
            await post_at_once(served, bodies)
    assert forwards.were_shared


async def test_the_second_image_of_a_request_is_of_the_next_seed(served: ServedFamily) -> None:
    if served.runner.capabilities().max_n == 1 or served.family.name in OTHER_SECOND_IMAGE:
        return
    variation = variations_of(served)[0]
    (response,) = await post_at_once(served, [body_of(served, variation) | {"n": 2}])
    _, second = images_of(response)
    assert_equal(second, plain_image(served, variation, 1))


def test_what_guidance_costs_is_found_out(served: ServedFamily) -> None:
    if served.reach is not FROM_TEXT:
        return
    name, limits = served.family.name, served.runner.capabilities()
    assert limits.guidance.argument == ARGUMENTS.get(name, "guidance_scale")
    assert limits.guidance.guided == GUIDANCE_COSTS.get(name, CLASSIC.guided)
    assert limits.guidance.negative_prompt is (name not in NO_NEGATIVE_PROMPT)
    steps_of_default = limits.steps_of(limits.default_scheduler)
    assert (steps_of_default == StepRange(2, 2)) is (name in TWO_STEPS)


def test_router_and_engine_agree_on_rows_and_calls(served: ServedFamily) -> None:
    if served.reach is not FROM_TEXT or served.family.name in OTHER_CALLS:
        return
    limits, runner = served.runner.capabilities(), served.runner
    asked = a_request(runner, Task.TEXT_TO_IMAGE, limits.sizes.native)
    request = replace(asked, id="counted")
    drawn(runner, request)
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


def test_every_task_is_done_at_several_sizes(served: ServedFamily) -> None:
    if served.reach is not FROM_TEXT or served.family.name in OTHER_SIZES:
        return
    name, limits = served.family.name, served.runner.capabilities()
    sides = {limits.sizes.native}
    if name not in ONE_SIZE:
        sides.add(limits.sizes.maximum)
    for task in limits.tasks:
        for side_px in sides:
            request = a_request(served.runner, task, side_px)
            image, steps = drawn(served.runner, request)
            assert image.size == (side_px, side_px)
            if name not in OWN_COUNT:
                assert steps == denoiser_calls(served.runner.model, request)


def a_request(runner: PipelineRunner, task: Task, side_px: int) -> GenerationRequest:
    limits = runner.capabilities()
    usual = replace(
        limits.usual_request(f"{task}-{side_px}", task),
        width=side_px,
        height=side_px,
        num_inference_steps=limits.steps_of(limits.default_scheduler).nearest(STEPS),
        seed=SEED,
    )
    strength = None if usual.strength is None else STRENGTH
    return with_required_inputs(replace(usual, strength=strength), runner.model.factory.tasks[task])


def drawn(runner: PipelineRunner, request: GenerationRequest) -> tuple[Image.Image, int]:
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


def assert_equal(image: Image.Image, plain: Image.Image) -> None:
    """Equal but for rounding to whole levels, and no image of one colour."""
    difference = np.asarray(image, int) - np.asarray(plain, int)
    assert np.abs(difference).max() <= LEVELS
    assert np.asarray(plain).std() > LEVELS


def test_every_family_that_makes_images_is_reached_or_named_with_the_reason() -> None:
    found = {
        name
        for name, family in FAMILIES.items()
        if read_signature(type(resident(family))).makes == "images"
    }
    named = [*REACHES, *TRIED_ELSEWHERE, *UNREACHED]
    assert sorted(named) == sorted(found)


def test_the_docs_name_each_call_and_each_reason() -> None:
    page = PAGE.read_text()
    told = [line.removeprefix("| ").split(" | ") for line in page.splitlines()]
    calls = {cells[0]: cells[2] for cells in told if "`POST " in "".join(cells[2:3])}
    reaches = REACHES | TRIED_ELSEWHERE
    assert [name for name in reaches if calls.get(name) != reaches[name].describe()] == []
    named = [f"- **{name}**: {reason}." for name, reason in UNREACHED.items()]
    assert [line for line in named if line not in page.splitlines()] == []
