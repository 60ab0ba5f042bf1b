"""Requests with different adapters of every task, and while adapters come and go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted_families import (
    ATTENTION,
    AdaptedFamily,
    Kind,
    Plain,
    Uses,
    Waiting,
    serve_together,
    use,
)
from adapter_writers import diffusers_saved, kohya, make_factors
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from families.catalogue import FAMILIES
from families.family import Variation
from parity_cases import Forwards
from safetensors.torch import save_file
from stepserve.domain.events import Finished
from stepserve.domain.requests import ControlUse, GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.ray_serve.replica.request_tracker import RequestTracker
from stepserve.routing.reports import AdapterMixing
from tiny_adapters import load_plain, with_adapters
from tiny_controls import drawing, opened, png, save_controlnet
from tiny_model import UNTRIED, a_request, save_tiny_model, submit_all
from torch import Tensor

ROUNDING = 1e-10
PATIENCE_S = 240
# As kohya's LoCon has them: of each kind of convolution, and of what looks at the timestep.
CONVOLUTIONS = (
    "conv_in",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "proj_in",
    "time_emb_proj",
    "conv_out",
)
KINDS = {
    "eight": Kind(rank=8, alpha=8),
    "four": Kind(rank=4, alpha=6),
    "keys": Kind(layers=("to_k",)),
    "large": Kind(rank=16, alpha=16),
    "small": Kind(rank=2, alpha=2),
    "stretched": Kind(dora=True),
    "values": Kind(layers=("to_v", "to_out.0"), rank=3, alpha=3),
}
MIXED = [name for name in KINDS if name != "stretched"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


class EveryTask:
    """A tiny model with adapters and a ControlNet: served, and plain."""

    NAMES = ("attention", "convolutions", "text")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny_model(folder / "model")
        save_controlnet(folder / "edges")
        (folder / "adapters").mkdir()
        bare = load_plain(folder / "model")
        attention = make_factors(bare.unet, ATTENTION, seed=1, ranks=(8,))
        convolutions = make_factors(bare.unet, (*ATTENTION, *CONVOLUTIONS), seed=2, ranks=(4,))
        text = make_factors(bare.text_encoder, ("q_proj", "v_proj", "fc1"), seed=3)
        more = make_factors(bare.unet, ("to_k", "to_v"), seed=4)
        files = {
            "attention": diffusers_saved({"unet": attention}),
            "convolutions": kohya({"unet": convolutions}, alpha=lambda path, rank: 2.0),
            "text": diffusers_saved({"unet": more, "text_encoder": text}),
        }
        for name, tensors in files.items():
            save_file(tensors, self.file(name))
        self._bare, adapted = self._load(), self._load()
        self._adapted = with_adapters(adapted, [self.file(name) for name in self.NAMES])

    def file(self, name: str) -> Path:
        return self.folder / "adapters" / f"{name}.safetensors"

    def runner(self) -> PipelineRunner:
        model = load_model("tiny", self.folder / "model", "float32", "cpu")
        model.pipeline.to(torch.float64)
        engine = EngineOptions(max_rows=32, max_pending_images=100, threads=1)
        adapters = AdapterOptions(folder=self.folder / "adapters")
        controls = ControlOptions(named={"edges": ControlSource(self.folder / "edges")})
        return PipelineRunner(model, engine, adapters, UNTRIED, controls)

    def plain(self, request: GenerationRequest) -> list[Any]:
        """What diffusers' own class draws, called alone."""
        pipeline = self._bare
        if request.adapters:
            pipeline = self._adapted
            used = sorted(request.adapters, key=lambda one: one.name)
            names = [f"plain{self.NAMES.index(one.name)}" for one in used]
            pipeline.set_adapters(names, [one.scale for one in used])
        cls, parts, arguments = self._task(pipeline, request)
        own = cls(**pipeline.components, **parts, requires_safety_checker=False)
        own.set_progress_bar_config(disable=True)
        seeds = range(request.seed, request.seed + request.n)
        images = own(
            request.prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.n,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **arguments,
        ).images
        return [np.asarray(image, dtype=np.int16) for image in images]

    def _task(
        self, pipeline: Any, request: GenerationRequest
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The class for it, what that has besides, and what it is told."""
        size = {"width": request.width, "height": request.height}
        image = {"image": drawing(9), "strength": request.strength}
        if request.controls:
            network = ControlNetModel.from_pretrained(self.folder / "edges").to(torch.float64)
            scale = {"controlnet_conditioning_scale": request.controls[0].scale}
            told = {**size, **scale, "image": drawing()}
            return StableDiffusionControlNetPipeline, {"controlnet": network}, told
        if request.mask:
            return StableDiffusionInpaintPipeline, {}, size | image | {"mask_image": mask_image()}
        if request.images:
            return StableDiffusionImg2ImgPipeline, {}, image
        return type(pipeline), {}, size

    def _load(self) -> Any:
        return load_plain(self.folder / "model").to(torch.float64)


def mask_image() -> Any:
    return drawing(9).convert("L").point(lambda value: 255 * (value > 127))


def every_task() -> list[GenerationRequest]:
    """Requests of each task and kind, with adapters of their own."""
    image = {"images": (png(drawing(9)),), "strength": 0.8, "num_inference_steps": 5}
    control = {"controls": (ControlUse("edges", png(drawing()), 0.8),)}
    asked: list[tuple[Uses, dict[str, Any]]] = [
        (use("attention"), {}),
        (use("convolutions", -0.7), {"n": 2, "guidance_scale": 0.0}),
        ((*use("attention", 0.5), *use("convolutions", 0.6)), {"n": 3}),
        ((), {"n": 2}),
        (use("text", 0.8), {}),
        (use("attention", 0.7), control),
        ((), control),
        ((*use("text"), *use("convolutions")), {"task": Task.IMAGE_TO_IMAGE, **image}),
        (use("attention"), {"task": Task.INPAINTING, "mask": png(mask_image()), **image}),
        ((), {"task": Task.IMAGE_TO_IMAGE, **image}),
    ]
    return [
        a_request(
            id=str(index), seed=10 * index, **{"num_inference_steps": 4, **more}, adapters=uses
        )
        for index, (uses, more) in enumerate(asked)
    ]


def images_of(runner: PipelineRunner, requests: Sequence[GenerationRequest]) -> list[list[Any]]:
    outcomes = [inbox.wait() for inbox in submit_all(runner, requests)]
    for outcome in outcomes:
        assert isinstance(outcome, Finished), outcome
    return [[opened(image.data) for image in outcome.images] for outcome in outcomes]


def test_every_task_with_adapters_of_its_own_gives_the_plain_images(tmp_path: Path) -> None:
    """In float64, where no pixel is rounded otherwise."""
    served, requests = EveryTask(tmp_path), every_task()
    runner = served.runner()
    runner.start()
    together = images_of(runner, requests)
    alone = [images_of(runner, [request])[0] for request in requests]
    runner.stop()
    assert runner.engine.counters.retries == 0
    for request, images, same in zip(requests, together, alone, strict=True):
        wanted = served.plain(request)
        for image, one, other in zip(images, wanted, same, strict=True):
            assert np.array_equal(image, one), request
            assert np.array_equal(image, other), request


class Serving:
    """A family with a folder of adapters that tests change."""

    def __init__(self, folder: Path, max_loaded: int) -> None:
        self.adapted = AdaptedFamily(FAMILIES["Stable Diffusion"], folder, KINDS)
        self.adapted.save()
        # Before a test replaces a file.
        self.plain = Plain(self.adapted)
        self.runner = self.adapted.runner(max_loaded=max_loaded)
        self.forwards = Forwards()
        self.runner.start()
        self.runner.engine.observe(self.forwards)

    def submit_in_turn(self, requests: Sequence[tuple[Variation, Uses]]) -> list[Waiting]:
        """Each as soon as the one before it has done a step."""
        return [self._submit_and_step(variation, uses) for variation, uses in requests]

    def _submit_and_step(self, variation: Variation, uses: Uses) -> Waiting:
        has_begun = threading.Event()
        waiting = self.adapted.submit(self.runner, variation, uses, lambda step: has_begun.set())
        assert has_begun.wait(PATIENCE_S)
        return waiting

    def together(self, requests: Sequence[tuple[Variation, Uses]]) -> list[Tensor]:
        """All at once."""
        return serve_together(self.adapted, self.runner, requests)

    def assert_plain(self, image: Tensor, variation: Variation, uses: Uses) -> None:
        wanted = self.plain(variation, uses)
        assert (image - wanted).abs().max() < ROUNDING, uses


@pytest.fixture(params=[1, 2])
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path, request.param)
    yield made
    made.runner.stop()


def a_variation(index: int, steps: int) -> Variation:
    # Of the first scheduler, whose steps are as many as the calls.
    return Variation(6 * index, 100 + index, steps, (4.0, 1.0)[index % 2])


def test_adapters_are_loaded_and_evicted_while_others_are_in_flight(serving: Serving) -> None:
    """Eight in flight, each longer than all before it are still to go, and seldom two alike."""
    sets = [*map(use, MIXED), (), (*use("eight", 0.5), *use("keys", -1.0))]
    requests = [(a_variation(index, 12 - index), uses) for index, uses in enumerate(sets)]
    if serving.runner.adapters.max_per_request < 2:
        requests = [(variation, uses[:1]) for variation, uses in requests]
    waiting = serving.submit_in_turn(requests)
    for one, request in zip(waiting, requests, strict=True):
        serving.assert_plain(one.wait(), *request)
    assert max(len(ids) for ids in serving.forwards.ids) >= 4
    assert len(serving.runner.adapters.loaded) <= serving.runner.adapters.options.max_loaded
    # Those that were evicted come again.
    again = [(a_variation(20 + index, 2), use(name)) for index, name in enumerate(MIXED)]
    for one, request in zip(serving.submit_in_turn(again), again, strict=True):
        serving.assert_plain(one.wait(), *request)


def test_a_replaced_file_shares_forwards_with_requests_that_have_the_old_one(
    serving: Serving,
) -> None:
    before, after = (a_variation(0, 12), use("eight")), (a_variation(1, 4), use("eight"))
    (old,) = serving.submit_in_turn([before])
    shutil.copy(serving.adapted.file("large"), serving.adapted.file("eight"))
    (new,) = serving.submit_in_turn([after])
    serving.assert_plain(new.wait(), after[0], use("large"))
    serving.assert_plain(old.wait(), *before)
    assert any(len(ids) == 2 for ids in serving.forwards.ids)


def test_dora_has_forwards_of_its_own_and_is_told(serving: Serving) -> None:
    sets = (use("stretched"), use("eight"), (), use("stretched"), use("large"))
    requests = [(a_variation(index, 6), uses) for index, uses in enumerate(sets)]
    for image, request in zip(serving.together(requests), requests, strict=True):
        serving.assert_plain(image, *request)
    ids = {frozenset(ids) for ids in serving.forwards.ids}
    own, others = {"0", "18"}, {"6", "12", "24"}
    assert all(one <= own or one <= others for one in ids)
    assert {frozenset(own), frozenset(others)} <= ids
    told = {each.name: each for each in serving.runner.capabilities().adapter_sharing}
    assert told["eight"].shares
    assert not told["stretched"].shares
    assert told["stretched"].reason.startswith("its layer unet.")
    report = RequestTracker(serving.runner).report()
    assert report.adapters == AdapterMixing(is_done=True, separate=("stretched",))
