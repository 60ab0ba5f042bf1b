"""Images that are drawn small, enlarged and refined: two plain calls in one request."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from stepserve.domain.errors import CancelledError, ContentFilteredError, InvalidRequestError
from stepserve.domain.events import Failed, Finished, Preview, StepFinished
from stepserve.domain.requests import GenerationRequest, Hires
from stepserve.domain.tasks import Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import Phase
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests import hires as hires_module
from stepserve.pipelines.requests.hires import make_in_phases
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, Inbox, a_request, pixels, submit_all

TWICE = Hires(scale=2.0, strength=0.5, num_inference_steps=6, width=96, height=128)


def an_enlarged(**changes: Any) -> GenerationRequest:
    usual: dict[str, Any] = {
        "width": 48,
        "height": 64,
        "num_inference_steps": 4,
        "hires": TWICE,
        "scheduler": "EulerAncestralDiscreteScheduler",
    }
    return a_request(**usual | changes)


def plain(model: Any, request: GenerationRequest) -> list[Image.Image]:
    """Two calls of diffusers' own pipelines, one after the other, with the same generators."""
    assert request.hires is not None
    parts = model.pipeline.components | {
        "scheduler": model.schedulers[request.scheduler].from_config(
            model.pipeline.scheduler.config
        )
    }
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)]
    common = {
        "prompt": request.prompt,
        "guidance_scale": request.guidance_scale,
        "num_images_per_prompt": request.n,
        "generator": generators,
    }
    draw = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    draw.set_progress_bar_config(disable=True)
    small = draw(
        **common,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
    ).images
    size = request.hires.width, request.hires.height
    refine = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    refine.set_progress_bar_config(disable=True)
    images: list[Image.Image] = refine(
        **common,
        image=[image.resize(size, Image.Resampling.LANCZOS) for image in small],
        strength=request.hires.strength,
        num_inference_steps=request.hires.num_inference_steps,
    ).images
    return images


def differ_by(data: bytes, image: Image.Image) -> int:
    served = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    return int(np.abs(served - np.asarray(image, int)).max())


def finished(inbox: Inbox) -> Finished:
    outcome = inbox.wait()
    assert isinstance(outcome, Finished), outcome
    return outcome


def steps_of(inbox: Inbox) -> list[tuple[int, int]]:
    return [(e.step, e.steps) for e in inbox.events if isinstance(e, StepFinished)]


def serve_at_once(model: LoadedModel, requests: Sequence[GenerationRequest]) -> list[Inbox]:
    options = EngineOptions(max_rows=16, max_pending_images=20)
    runner = PipelineRunner(model, options, sharing=UNTRIED)
    inboxes = submit_all(runner, requests)
    runner.start()
    try:
        for inbox in inboxes:
            inbox.wait()
    finally:
        runner.stop()
    assert runner.engine.counters.retries == 0
    return inboxes


@pytest.fixture
def rows(tiny: LoadedModel) -> Any:
    """Rows and width of the latents of every denoiser forward that really runs."""
    seen: list[tuple[int, int]] = []
    handle = tiny.pipeline.unet.conv_in.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape[0], args[0].shape[3]))
    )
    yield seen
    handle.remove()


def test_requests_at_once_give_what_two_plain_calls_give(
    tiny: LoadedModel, rows: list[tuple[int, int]]
) -> None:
    requests = [
        an_enlarged(id="two", n=2),
        an_enlarged(id="other", seed=50, prompt="apple", scheduler="DDIMScheduler"),
        # Of the size that the others go on at.
        an_enlarged(id="large", hires=None, width=96, height=128, num_inference_steps=12),
    ]
    two, other, large = (inbox.events[-1] for inbox in serve_at_once(tiny, requests))
    # Both phases are shared, the second one also with who began at that size.
    assert (6, 6) in rows
    assert (8, 12) in rows
    assert isinstance(two, Finished)
    assert isinstance(other, Finished)
    assert isinstance(large, Finished)
    for request, event in ((requests[0], two), (requests[1], other)):
        wanted = plain(tiny, request)
        assert [image.size for image in wanted] == [(96, 128)] * request.n
        for file, image in zip(event.images, wanted, strict=True):
            assert differ_by(file.data, image) <= 1


def test_each_image_is_the_same_alone(tiny: LoadedModel) -> None:
    with torch.no_grad():
        both = make_in_phases(tiny, an_enlarged(n=2))
        alone = [make_in_phases(tiny, an_enlarged(seed=3 + i))[0] for i in range(2)]
    for one, other in zip(both, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_the_noise_goes_on_where_the_first_call_stopped(tiny: LoadedModel) -> None:
    """Begun anew, the refinement would add the noise that the small image began with."""
    request = an_enlarged(scheduler="DDIMScheduler")
    small, refinement = request.phases
    with torch.no_grad():
        (image,) = make_in_phases(tiny, request)
        (first,) = make_in_phases(tiny, small)
        inputs = hires_module.enlarged([first], hires_module.NO_IMAGES, refinement)
        (anew,) = hires_module.make_images(tiny, refinement, inputs)
    assert np.abs(np.asarray(image, int) - np.asarray(anew, int)).max() > 1


def test_steps_and_previews_are_counted_through_both_phases(runner: PipelineRunner) -> None:
    inbox = Inbox()
    runner.submit(an_enlarged(previews=6), inbox)
    finished(inbox)
    # Half of six steps are done to refine.
    assert steps_of(inbox) == [(step, 7) for step in range(1, 8)]
    previews = [event for event in inbox.events if isinstance(event, Preview)]
    assert [(p.index, p.step, p.steps) for p in previews] == [(i, i + 1, 7) for i in range(6)]
    sizes = [Image.open(io.BytesIO(p.images[0].data)).size for p in previews]
    assert sizes == [(48, 64)] * 4 + [(96, 128)] * 2


def test_what_is_predicted_knows_both_sizes(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    submit = runner.engine.submit

    def watched(track: Any) -> None:
        seen.append(track)
        submit(track)

    monkeypatch.setattr(runner.engine, "submit", watched)
    inbox = Inbox()
    runner.submit(an_enlarged(scheduler="HeunDiscreteScheduler"), inbox)
    finished(inbox)
    (track,) = seen
    # Heun calls the network twice a step, but for the last.
    assert track.phases == (Phase(7, (48, 64)), Phase(5, (96, 128)))
    assert track.steps_done == track.steps == 12
    sizes = runner.engine.step_costs()
    assert {(48, 64), (96, 128)} <= sizes.keys()


def test_guidance_ends_early_in_both_phases(
    runner: PipelineRunner, rows: list[tuple[int, int]]
) -> None:
    inbox = Inbox()
    request = an_enlarged(
        guidance_end=0.5, hires=replace(TWICE, strength=1.0), scheduler="DDIMScheduler"
    )
    runner.submit(request, inbox)
    finished(inbox)
    assert rows == [(2, 6)] * 2 + [(1, 6)] * 2 + [(2, 12)] * 3 + [(1, 12)] * 3


@pytest.mark.parametrize("step", [2, 6])
def test_a_request_is_cancelled_in_either_phase(runner: PipelineRunner, step: int) -> None:
    inbox = Inbox()
    request = an_enlarged()

    def sink(event: Any) -> None:
        inbox(event)
        if isinstance(event, StepFinished) and event.step == step:
            runner.cancel(request.key)

    runner.submit(request, sink)
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, CancelledError)
    assert len(steps_of(inbox)) == step
    assert runner.engine.load().requests == 0


def test_equal_seeds_give_equal_bytes(runner: PipelineRunner) -> None:
    inboxes = submit_all(
        runner, [an_enlarged(id=str(number), reproducible=True) for number in range(2)]
    )
    one, other = (finished(inbox).images[0].data for inbox in inboxes)
    assert one == other
    assert Image.open(io.BytesIO(one)).size == (96, 128)
    assert pixels(one) != pixels(finished(resubmitted(runner, seed=4)).images[0].data)


def resubmitted(runner: PipelineRunner, **changes: Any) -> Inbox:
    inbox = Inbox()
    runner.submit(an_enlarged(**changes), inbox)
    return inbox


def test_an_image_that_was_withheld_small_is_withheld_large(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    withheld: list[list[int]] = [[1], [0]]
    make: Callable[..., Any] = hires_module.make_images

    def checked(*args: Any) -> Any:
        images = make(*args)
        made.append(len(images))
        now = withheld.pop(0)
        return [None if index in now else image for index, image in enumerate(images)]

    monkeypatch.setattr(hires_module, "make_images", checked)
    with torch.no_grad():
        images = make_in_phases(tiny, an_enlarged(n=3))
    assert made == [3, 3]
    assert [image is None for image in images] == [True, True, False]


def test_nothing_is_refined_if_all_are_withheld(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Task] = []

    def refusing(model: Any, part: GenerationRequest, *rest: Any) -> Any:
        calls.append(part.task)
        raise ContentFilteredError("all")

    monkeypatch.setattr(hires_module, "make_images", refusing)
    with pytest.raises(ContentFilteredError):
        make_in_phases(tiny, an_enlarged())
    assert calls == [Task.TEXT_TO_IMAGE]


def test_steps_that_the_scheduler_cannot_do_are_refused(runner: PipelineRunner) -> None:
    one_step = Hires(scale=2.0, strength=0.1, num_inference_steps=9, width=96, height=128)
    inbox = resubmitted(runner, hires=one_step)
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == "hires.strength"
    assert "at least 0.1112" in outcome.error.message


def test_settings_that_only_the_scheduler_knows_to_be_wrong_are_named(
    runner: PipelineRunner,
) -> None:
    """It begins with four steps of a higher order."""
    few = Hires(scale=2.0, strength=0.5, num_inference_steps=2, width=96, height=128)
    request = an_enlarged(hires=few, scheduler="PNDMScheduler", num_inference_steps=8)
    with pytest.raises(InvalidRequestError) as refused:
        hires_module.calls_of_phases(runner.model, request)
    assert refused.value.field == "hires.num_inference_steps"
    assert refused.value.message.startswith("hires.num_inference_steps 2 with strength 0.5")


def test_it_is_offered_where_both_tasks_are(tiny: LoadedModel) -> None:
    assert Role.HIRES in tiny.capabilities.inputs_of(Task.TEXT_TO_IMAGE)
    assert Role.HIRES not in tiny.capabilities.inputs_of(Task.IMAGE_TO_IMAGE)
