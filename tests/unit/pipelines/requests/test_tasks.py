"""Several tasks over one set of modules, and what a request turns into for the engine."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from cachetools import LRUCache
from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from PIL import Image
from stepserve.domain.errors import GenerationFailedError, InvalidRequestError, StepserveError
from stepserve.domain.events import Failed, Finished
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.requests import GenerationRequest, Priority
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.copies.blending import BlendedDenoiser, denoiser_for_inpainting
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.copies.guidance_interval import can_limit_guidance, narrow_to_interval
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.requests.call import count_left, denoiser_calls, make_images
from stepserve.pipelines.requests.inputs import decode_inputs
from stepserve.pipelines.schedulers.watch import watch_steps
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import (
    UNTRIED,
    Inbox,
    a_request,
    default_scheduler,
    pixels,
    save_tiny_model,
    submit_all,
)

CLASSES = {
    Task.TEXT_TO_IMAGE: "StableDiffusionPipeline",
    Task.IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
    Task.INPAINTING: "StableDiffusionInpaintPipeline",
}


def png(shade: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").point(lambda value: (value + shade) % 256).convert(mode).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def a_request_for(task: Task, strength: float = 0.8, **changes: Any) -> GenerationRequest:
    files: dict[str, Any] = {}
    if task is not Task.TEXT_TO_IMAGE:
        files |= {"images": (png(90),), "strength": strength}
    if task is Task.INPAINTING:
        files["mask"] = png(0, "L")
    return a_request(id=task.value, task=task, **(files | {"num_inference_steps": 4} | changes))


def serve(model: LoadedModel, *requests: GenerationRequest) -> tuple[list[Any], PipelineRunner]:
    """All at once, so that whatever may share does."""
    runner = PipelineRunner(
        model, EngineOptions(max_rows=16, max_pending_images=20), sharing=UNTRIED
    )
    inboxes = submit_all(runner, requests)
    runner.start()
    outcomes = [inbox.wait() for inbox in inboxes]
    runner.stop()
    return outcomes, runner


@pytest.fixture
def rows(tiny: LoadedModel) -> Iterator[list[int]]:
    """Rows of every denoiser forward that really runs."""
    seen: list[int] = []
    handle = tiny.pipeline.unet.conv_in.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0])
    )
    yield seen
    handle.remove()


def test_the_model_says_what_it_can_do(tiny: LoadedModel) -> None:
    assert tuple(tiny.capabilities.tasks) == tuple(tiny.factory.tasks) == tuple(CLASSES)
    assert tiny.capabilities.guidance_interval


@pytest.mark.parametrize("task", CLASSES)
def test_every_task_is_diffusers_own_pipeline_over_the_same_modules(
    tiny: LoadedModel, task: Task
) -> None:
    one, other = (tiny.factory.copy("EulerDiscreteScheduler", task) for _ in range(2))
    assert type(one).__name__ == CLASSES[task]
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(one, name) is getattr(tiny.pipeline, name)
    assert one.tokenizer is other.tokenizer is tiny.pipeline.tokenizer
    assert one.scheduler is not other.scheduler
    assert one._progress_bar_config == {"disable": True}


def test_the_resident_scheduler_keeps_its_settings(tmp_path: Path) -> None:
    """The constructors of some pipelines change them."""
    scheduler = PNDMScheduler.from_config(default_scheduler().config)
    model = load_model("m", save_tiny_model(tmp_path, scheduler), dtype="float32")
    assert model.pipeline.scheduler.config.skip_prk_steps is False
    for task in CLASSES:
        assert model.factory.copy("PNDMScheduler", task).scheduler.config.skip_prk_steps is False


def test_a_pipeline_without_other_tasks_has_one() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
    )
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    assert PipelineFactory(pipeline, {}).tasks.keys() == {Task.UNCONDITIONAL}
    assert not can_limit_guidance(pipeline)


def test_all_tasks_share_their_steps(tiny: LoadedModel, rows: list[int]) -> None:
    # One that needs no image encoded is a few steps ahead of the others.
    requests = [a_request_for(task, strength=1.0, num_inference_steps=16) for task in CLASSES]
    outcomes, runner = serve(tiny, *requests)
    assert 6 in rows
    assert runner.engine.counters.retries == 0
    images = {pixels(outcome.images[0].data) for outcome in outcomes}
    assert len(images) == 3
    for request, outcome in zip(requests, outcomes, strict=True):
        with torch.no_grad():
            (wanted,) = make_images(tiny, request, decode_inputs(request))
        pairs = zip(pixels(outcome.images[0].data), wanted.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1


def test_the_image_and_the_mask_matter(tiny: LoadedModel) -> None:
    request = a_request_for(Task.INPAINTING, strength=0.5)
    others = [replace(request, images=(png(10),)), replace(request, mask=png(128, "L"))]
    with torch.no_grad():
        made = [make_images(tiny, r, decode_inputs(r))[0].tobytes() for r in [request, *others]]
    assert len(set(made)) == 3


@pytest.mark.parametrize("task", [Task.IMAGE_TO_IMAGE, Task.INPAINTING])
@pytest.mark.parametrize(
    ("scheduler", "steps", "strength", "calls"),
    [
        ("DDIMScheduler", 10, 1.0, 10),
        ("DDIMScheduler", 10, 0.55, 5),
        ("DDIMScheduler", 10, 0.1, 1),
        ("HeunDiscreteScheduler", 10, 0.5, 9),
        ("KDPM2DiscreteScheduler", 10, 0.3, 5),
        ("PNDMScheduler", 6, 0.5, 12),
    ],
)
def test_work_is_estimated_with_strength(
    tiny: LoadedModel, task: Task, scheduler: str, steps: int, strength: float, calls: int
) -> None:
    request = a_request_for(task, scheduler=scheduler, num_inference_steps=steps, strength=strength)
    assert denoiser_calls(tiny, request) == calls
    inbox = Inbox()
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    runner.start()
    runner.submit(request, inbox)
    assert isinstance(inbox.wait(), Finished)
    runner.stop()
    assert inbox.kinds.count("StepFinished") == calls


class Chooses:
    """Chooses its timesteps as some pipelines do, from what it is told."""

    scheduler = SimpleNamespace(timesteps=torch.arange(10), sigmas=torch.linspace(1, 0, 11))


class WithoutDevice(Chooses):
    def get_timesteps(self, num_inference_steps: int, strength: float) -> tuple[Any, int]:
        left = int(num_inference_steps * strength)
        return self.scheduler.timesteps[-left:], left


class WithTimesteps(Chooses):
    def get_timesteps(
        self, num_inference_steps: int, timesteps: Any, strength: float, device: Any
    ) -> tuple[Any, int]:
        left = int(num_inference_steps * strength)
        return timesteps[-left:], left


class WithSigmas(Chooses):
    def get_timesteps(
        self, sigmas: Any, timesteps: Any, num_inference_steps: int, strength: float
    ) -> tuple[Any, Any, int]:
        left = int(num_inference_steps * strength)
        return sigmas[-left - 1 :], timesteps[-left:], left


@pytest.mark.parametrize("kind", [Chooses, WithoutDevice, WithTimesteps, WithSigmas])
def test_timesteps_that_a_strength_leaves_are_counted_however_they_are_chosen(kind: type) -> None:
    request = a_request_for(Task.IMAGE_TO_IMAGE, num_inference_steps=10, strength=0.4)
    assert count_left(kind(), request, timesteps=10) == 4


def test_strengths_that_clients_make_up_are_forgotten(tiny: LoadedModel) -> None:
    tiny = replace(tiny, denoiser_calls=LRUCache(3))
    for tenth in range(1, 10):
        request = a_request_for(Task.IMAGE_TO_IMAGE, num_inference_steps=10, strength=tenth / 10)
        assert denoiser_calls(tiny, request) == tenth
    assert len(tiny.denoiser_calls) <= 3


def test_steps_are_seen_at_the_scheduler_where_a_pipeline_does_not_tell() -> None:
    seen: list[tuple[int, float]] = []
    scheduler = default_scheduler()
    scheduler.set_timesteps(2)
    watch_steps(scheduler, lambda step, latents: seen.append((step, float(latents.sum()))))
    assert "eta" in inspect.signature(scheduler.step).parameters
    sample = torch.zeros(1, 1, 2, 2)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample, return_dict=False)[0]
    assert seen == [(1, 0.0), (2, 0.0)]


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [
        (0.0, 0.5, [2, 2, 1, 1]),
        (0.5, 1.0, [1, 1, 2, 2]),
        (0.25, 0.75, [1, 2, 2, 1]),
        (0.0, 1.0, [2, 2, 2, 2]),
    ],
)
def test_steps_outside_the_interval_take_half_of_the_rows(
    tiny: LoadedModel, rows: list[int], task: Task, start: float, end: float, wanted: list[int]
) -> None:
    request = a_request_for(task, strength=1.0, guidance_start=start, guidance_end=end)
    (outcome,), _ = serve(tiny, request)
    assert isinstance(outcome, Finished)
    assert rows == wanted


def test_an_interval_makes_another_image_than_none_and_than_all(tiny: LoadedModel) -> None:
    request = a_request(num_inference_steps=4, guidance_scale=20.0)
    variants = [request, replace(request, guidance_end=0.5), replace(request, guidance_scale=1.0)]
    made = [serve(tiny, variant)[0][0].images[0].data for variant in variants]
    assert len({pixels(data) for data in made}) == 3


def test_an_interval_that_holds_no_step_is_no_guidance(tiny: LoadedModel, rows: list[int]) -> None:
    request = a_request(num_inference_steps=4)
    limited = replace(request, guidance_start=0.9, guidance_end=0.99)
    (one,), _ = serve(tiny, limited)
    (other,), _ = serve(tiny, replace(request, guidance_scale=1.0))
    assert rows == [1] * 8
    assert pixels(one.images[0].data) == pixels(other.images[0].data)


def test_steps_with_and_without_guidance_share_forwards(tiny: LoadedModel, rows: list[int]) -> None:
    requests = [
        a_request(id="a", num_inference_steps=4, guidance_end=0.5, n=2),
        a_request(id="b", num_inference_steps=4, seed=9),
    ]
    _, runner = serve(tiny, *requests)
    assert rows == [6, 6, 4, 4]
    assert runner.engine.counters.retries == 0


def test_nothing_is_narrowed_without_need() -> None:
    assert narrow_to_interval(CLASSIC, a_request(), 4) is None
    assert narrow_to_interval(CLASSIC, a_request(guidance_scale=1.0, guidance_end=0.5), 4) is None
    assert narrow_to_interval(CLASSIC, a_request(guidance_end=0.5), 4) is not None


def test_a_pipeline_with_other_rows_fails_its_request_and_says_why(tiny: LoadedModel) -> None:
    request = a_request(guidance_end=0.5)
    pipeline = tiny.factory.copy("DDIMScheduler")
    track = Track(
        id="r",
        rows=2,
        phases=(Phase(2),),
        images=1,
        run=lambda: pipeline("red heart", guidance_scale=1.0, num_inference_steps=2),
        listener=SimpleNamespace(**dict.fromkeys(("accepted", "started"), lambda *args: None)),
        guidance_interval=narrow_to_interval(
            CLASSIC, replace(request, guidance_start=0.5, guidance_end=1.0), 2
        ),
    )
    ended = Inbox()
    track.listener.failed = lambda error, timings: ended(Failed("r", cast(StepserveError, error)))
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    runner.engine.submit(track)
    runner.start()
    outcome = ended.wait()
    runner.stop()
    assert isinstance(outcome, Failed)
    assert "a call of 2 rows was expected" in str(outcome.error)


def test_reproducible_requests_share_no_forward(tiny: LoadedModel, rows: list[int]) -> None:
    requests = [a_request(id=str(index), seed=index) for index in range(3)]
    serve(tiny, *requests)
    assert rows == [6, 6]
    rows.clear()
    serve(tiny, *[replace(request, reproducible=True) for request in requests])
    assert rows == [2] * 6


def test_what_the_policy_needs_reaches_the_engine(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    submitted: list[Track] = []
    monkeypatch.setattr(runner.engine, "submit", submitted.append)
    runner.submit(a_request(), Inbox())
    urgent = a_request(priority=Priority.INTERACTIVE, deadline_s=3.5, reproducible=True, n=2)
    runner.submit(urgent, Inbox())
    runner.stop()
    plain, track = submitted
    assert (plain.priority, plain.deadline_s, plain.isolated) == (1, None, False)
    assert (track.priority, track.deadline_s, track.isolated) == (0, 3.5, True)
    assert (track.rows, track.steps, track.images) == (4, 2, 2)


def test_a_file_that_is_no_image_is_refused_at_once(runner: PipelineRunner) -> None:
    inbox = Inbox()
    runner.submit(a_request_for(Task.IMAGE_TO_IMAGE, images=(b"no image",)), inbox)
    outcome = inbox.wait()
    assert inbox.kinds == ["Failed"]
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == "image"


def test_finished_requests_tell_the_models_fingerprint(tiny: LoadedModel) -> None:
    (finished,), runner = serve(tiny, a_request())
    fingerprint = runner.capabilities().fingerprint
    assert fingerprint is not None
    assert finished.fingerprint == fingerprint.short


@pytest.mark.parametrize(
    ("inputs", "latents", "blended"), [(4, 4, False), (9, 4, False), (16, 16, True)]
)
def test_what_the_inpainting_pipeline_is_told_of_the_denoiser(
    inputs: int, latents: int, blended: bool
) -> None:
    unet = SimpleNamespace(config={"in_channels": inputs, "sample_size": 8}, dtype="bf16")
    unet.config = type(default_scheduler().config)(unet.config)
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=latents))
    told = denoiser_for_inpainting(SimpleNamespace(unet=unet, vae=vae))
    assert isinstance(told, BlendedDenoiser) is blended
    if blended:
        assert (told.config.in_channels, told.config.sample_size, told.dtype) == (4, 8, "bf16")
        assert unet.config.in_channels == inputs
    else:
        assert told is unet


def test_a_denoiser_of_other_inputs_cannot_inpaint() -> None:
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=8))
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    with pytest.raises(ValueError, match="8 input channels cannot inpaint"):
        denoiser_for_inpainting(SimpleNamespace(unet=unet, vae=vae))


def test_numbers_that_overflow_are_a_failure_for_every_task(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = tiny.pipeline.unet.conv_out.bias
    kept = bias.data.clone()
    bias.data.fill_(float("inf"))
    try:
        outcomes, _ = serve(tiny, *[a_request_for(task) for task in CLASSES])
    finally:
        bias.data.copy_(kept)
    for outcome in outcomes:
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, GenerationFailedError)
