"""Models without a prompt: served from their folders as plain diffusers would draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from few_vectors import few_vectors
from PIL import Image
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import Event, Failed, Finished, Preview, StepFinished
from stepserve.domain.guidance import StepWork
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import ONE, Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up
from tiny_model import Inbox, submit_all
from tiny_unconditional import BUILDERS, CLASSES, SIDE_PX, save_unconditional, unet

LEVELS = 2
OF_CLASSES = ("consistency-of-classes", "dit")
Serve = Callable[[str], PipelineRunner]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save_unconditional(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


@pytest.fixture(scope="module")
def serve(folders: Callable[[str], Path]) -> Iterator[Serve]:
    """A runner for each model, made as a replica makes it, and kept for all tests."""
    runners: dict[str, PipelineRunner] = {}

    def served(name: str) -> PipelineRunner:
        if name not in runners:
            model = load_model(name, folders(name), dtype=dtype_of(name), device="cpu")
            options = EngineOptions(max_rows=8, max_pending_images=64)
            runners[name] = PipelineRunner(model, options)
            with few_vectors():
                runners[name].start()
        return runners[name]

    yield served
    for runner in runners.values():
        runner.stop()


def dtype_of(name: str) -> str:
    """The others are loaded in float32 whatever is asked for."""
    return "float32" if name == "dit" else "bfloat16"


def a_request(runner: PipelineRunner, **changes: Any) -> GenerationRequest:
    capabilities = runner.capabilities()
    label = 3 if capabilities.classes.count else None
    usual = replace(capabilities.usual_request("r"), num_inference_steps=5, class_label=label)
    return replace(usual, **changes)


def images(event: Event) -> list[np.ndarray]:
    assert isinstance(event, Finished), event
    return [pixels(image.data) for image in event.images]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def plainly(folder: Path, request: GenerationRequest) -> list[np.ndarray]:
    """What diffusers itself draws for a request."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, request.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)]
    arguments: dict[str, Any] = {"generator": generators, "batch_size": request.n}
    if request.class_label is not None:
        arguments["class_labels"] = [request.class_label] * request.n
    if isinstance(pipeline, diffusers.DiTPipeline):
        del arguments["batch_size"]
        arguments["guidance_scale"] = request.guidance_scale
    made = pipeline(num_inference_steps=request.num_inference_steps, **arguments).images
    return [np.asarray(image.convert("RGB")).astype(int) for image in made]


@pytest.mark.parametrize("name", BUILDERS)
def test_images_are_those_of_the_plain_pipeline(
    name: str, serve: Serve, folders: Callable[[str], Path]
) -> None:
    runner = serve(name)
    requests = [
        a_request(runner, id="two", n=2, seed=4),
        a_request(runner, id="one", seed=5, num_inference_steps=7),
        a_request(runner, id="second", seed=5),
    ]
    before = runner.engine.batcher.counters.retries
    made = [images(inbox.wait()) for inbox in submit_all(runner, requests)]

    for request, served in zip(requests, made, strict=True):
        plain = plainly(folders(name), request)
        differences = [furthest(one, other) for one, other in zip(served, plain, strict=True)]
        assert max(differences) <= LEVELS
    # Image i of n is the one of seed + i.
    assert furthest(made[0][1], made[2][0]) <= LEVELS
    assert furthest(made[0][0], made[0][1]) > 10 * LEVELS
    assert runner.engine.batcher.counters.retries == before


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_offered(name: str, serve: Serve) -> None:
    capabilities = serve(name).capabilities()
    task = Task.CLASS_TO_IMAGE if name in OF_CLASSES else Task.UNCONDITIONAL
    inputs = {Role.CLASS_LABEL: ONE} if name in OF_CLASSES else {}

    assert dict(capabilities.tasks) == {task: inputs}
    side_px = 2 * SIDE_PX if name == "ldm" else SIDE_PX
    assert (capabilities.sizes.minimum, capabilities.sizes.maximum) == (side_px, side_px)
    assert capabilities.max_n == 8
    assert capabilities.sharing_remark == ""
    assert capabilities.fingerprint is not None
    assert capabilities.fingerprint.dtype == "float32"
    assert bool(capabilities.guidance.argument) is (name == "dit")


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dit", "ldm"])
def test_every_scheduler_that_is_offered_draws(
    name: str, serve: Serve, folders: Callable[[str], Path]
) -> None:
    runner = serve(name)
    schedulers = runner.capabilities().schedulers
    requests = [a_request(runner, id=name, scheduler=name) for name in schedulers]
    made = [images(inbox.wait())[0] for inbox in submit_all(runner, requests)]

    assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"} <= {
        *schedulers
    }
    # These begin with more noise than a pipeline gives that does not ask them.
    assert ("EulerDiscreteScheduler" in schedulers) is (name == "ldm")
    plain = plainly(folders(name), requests[schedulers.index("DDIMScheduler")])
    assert furthest(made[schedulers.index("DDIMScheduler")], plain[0]) <= LEVELS


def test_hundreds_of_steps_and_twenty_share_forwards(
    serve: Serve, folders: Callable[[str], Path]
) -> None:
    """What DDPM wants beside what is enough for others."""
    runner = serve("ddpm")
    long = a_request(runner, id="long", num_inference_steps=200, seed=1)
    short = [
        a_request(runner, id=f"short-{i}", num_inference_steps=20, seed=2 + i, scheduler=name)
        for i, name in enumerate(("DDIMScheduler", "DPMSolverMultistepScheduler"))
    ]
    inboxes = submit_all(runner, [long, *short])
    outcomes = [inbox.wait() for inbox in inboxes]

    for request, outcome in zip([long, *short], outcomes, strict=True):
        assert furthest(images(outcome)[0], plainly(folders("ddpm"), request)[0]) <= LEVELS
    shares = [outcome.timings.batch_share for outcome in outcomes if isinstance(outcome, Finished)]
    # Each of the short ones had two others beside it at nearly every step.
    assert max(shares[1:]) < 0.5
    steps = [sum(isinstance(e, StepFinished) for e in inbox.events) for inbox in inboxes]
    assert steps == [200, 20, 20]


@pytest.mark.parametrize("name", ["ddpm", "ldm", "dit"])
def test_they_are_previewed(name: str, serve: Serve) -> None:
    runner, inbox = serve(name), Inbox()
    runner.submit(a_request(runner, n=2, num_inference_steps=8, previews=3), inbox)
    finished = images(inbox.wait())
    previews = [event for event in inbox.events if isinstance(event, Preview)]

    assert [(p.index, p.step, len(p.images)) for p in previews] == [(0, 2, 2), (1, 4, 2), (2, 6, 2)]
    shown = [pixels(preview.images[1].data) for preview in previews]
    assert {image.shape for image in shown} == {finished[1].shape}
    # The nearer to the end, the nearer to the image.
    distances = [int(np.abs(image - finished[1]).sum()) for image in shown]
    assert distances[-1] < distances[0]


def test_consistency_models_are_not_previewed(serve: Serve) -> None:
    runner, inbox = serve("consistency"), Inbox()
    runner.submit(a_request(runner, previews=3), inbox)

    assert isinstance(inbox.wait(), Finished)
    assert "Preview" not in inbox.kinds


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_class_decides_the_image_and_guidance_how_much(name: str, serve: Serve) -> None:
    runner = serve(name)
    requests = [
        a_request(runner, id="a", class_label=1),
        a_request(runner, id="b", class_label=2),
        a_request(runner, id="c", class_label=1),
        a_request(runner, id="d", class_label=1, guidance_scale=1.0),
    ]
    first, other, same, unguided = (
        images(inbox.wait())[0] for inbox in submit_all(runner, requests)
    )

    assert furthest(first, other) > LEVELS >= furthest(first, same)
    assert (furthest(first, unguided) > LEVELS) is (name == "dit")
    guidance = runner.capabilities().guidance
    guided = StepWork(2, 1) if name == "dit" else StepWork(1, 1)
    assert (guidance.guided, guidance.unguided) == (guided, StepWork(1, 1))


def test_noise_of_dits_schedulers_is_of_the_seed(serve: Serve) -> None:
    """Its pipeline gives them no generator, and steps twice the rows."""
    runner = serve("dit")
    two = a_request(runner, id="two", n=2, seed=4, scheduler="DDPMScheduler")
    one = a_request(runner, id="one", seed=5, scheduler="DDPMScheduler")
    of_two, of_one, again = (
        images(inbox.wait()) for inbox in submit_all(runner, [two, one, replace(one, id="x")])
    )

    assert furthest(of_two[1], of_one[0]) <= LEVELS
    assert furthest(of_one[0], again[0]) <= LEVELS


@pytest.mark.parametrize(
    ("name", "changes", "field", "message"),
    [
        (
            "ddpm",
            {"prompt": "a cat"},
            "prompt",
            "prompt must be left out: unconditional with model 'ddpm' does not take one (it takes: "
            "no input)",
        ),
        (
            "ddpm",
            {"class_label": 1},
            "class_label",
            "class_label must be left out: unconditional with model 'ddpm' does not take one (it "
            "takes: no input)",
        ),
        (
            "consistency-of-classes",
            {"class_label": CLASSES},
            "class_label",
            "class_label must be 0 to 9, got 10",
        ),
        (
            "consistency-of-classes",
            {"class_label": None},
            "class_label",
            "class_label is required by class-to-image with model 'consistency-of-classes' (it "
            "takes: class_label)",
        ),
        (
            "ddpm",
            {"guidance_scale": 3.0},
            "guidance_scale",
            "guidance_scale must be 0 to 1, got 3.0: model 'ddpm' takes no guidance; leave it out",
        ),
        (
            "ddpm",
            {"width": 32},
            "size",
            "size 32x16 is not accepted by 'ddpm': each side must be 16",
        ),
    ],
)
def test_what_a_model_does_not_take_is_refused(
    name: str, changes: dict[str, Any], field: str, message: str, serve: Serve
) -> None:
    runner, inbox = serve(name), Inbox()
    runner.submit(a_request(runner, **changes), inbox)
    outcome = inbox.wait()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert (outcome.error.field, outcome.error.message) == (field, message)


def test_classes_have_the_names_of_the_pipeline_or_of_the_manifest(
    serve: Serve, tmp_path: Path
) -> None:
    names = ["cat", ["dog", "hound"]]
    save_unconditional("consistency-of-classes", tmp_path, class_labels=names)
    said = load_model("m", tmp_path, device="cpu").capabilities.classes
    own = serve("dit").capabilities().classes

    assert (said.count, said.names) == (CLASSES, {0: ("cat",), 1: ("dog", "hound")})
    assert own.count == 1000
    assert own.names[281] == ("tabby", "tabby cat")
    assert own.numbers_of("TABBY cat") == [281]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"10": "owl"}, "class_labels names class 10; its denoiser has 10 classes, from 0 on"),
        ({"cat": 1}, "class_labels must be a list of names, or names by number"),
        ("cat", "class_labels must be a list of names, or names by number"),
    ],
)
def test_wrong_names_in_a_manifest_are_refused(said: object, words: str, tmp_path: Path) -> None:
    save_unconditional("consistency-of-classes", tmp_path, class_labels=said)

    with pytest.raises(ModelLoadError, match=words):
        load_model("m", tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["ddpm", "consistency-of-classes"])
def test_they_are_warmed_up(name: str, serve: Serve) -> None:
    runner = serve(name)
    warm_up(runner)

    assert runner.capabilities().expected_s is not None
    # The scheduler of consistency models does not tell what the image will be.
    assert runner.capabilities().previews == (name == "ddpm")


def test_a_scheduler_without_steps_is_refused(tmp_path: Path) -> None:
    pipeline = diffusers.ScoreSdeVePipeline(unet(), diffusers.ScoreSdeVeScheduler())
    pipeline.save_pretrained(tmp_path)

    with pytest.raises(ModelLoadError, match="ScoreSdeVeScheduler has no method `step`"):
        load_model("m", tmp_path, device="cpu")


def test_a_size_of_unequal_sides_that_no_request_can_choose_is_refused(tmp_path: Path) -> None:
    wide = diffusers.UNet2DModel(
        sample_size=(16, 32),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    diffusers.DDPMPipeline(wide, diffusers.DDPMScheduler()).save_pretrained(tmp_path)

    with pytest.raises(ModelLoadError, match=r"one size is not square: .* made for 16x32"):
        load_model("m", tmp_path, device="cpu")
