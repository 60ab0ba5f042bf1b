"""Trajectories: what is recorded, in which form, within which bounds, and that nothing changes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stepserve.domain.checks import trajectory_limits
from stepserve.domain.checks.limits import check_request
from stepserve.domain.checks.trajectory_limits import check_trajectory
from stepserve.domain.errors import InvalidRequestError, ServerFullError
from stepserve.domain.events import EncodedImage, Failed, Finished
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.domain.requests import Hires, OutputFormat, TrajectoryFormat, TrajectoryRequest
from stepserve.domain.step_cache import StepCacheUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.requests.trajectory import Trajectory, TrajectoryRoom, trajectory_of
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_families import save_tiny_flux
from tiny_model import Inbox, a_request

IMAGES = TrajectoryRequest(TrajectoryFormat.IMAGES)
TENSORS = TrajectoryRequest(TrajectoryFormat.SAFETENSORS)


def serve(runner: PipelineRunner, **changes: Any) -> tuple[EncodedImage, ...]:
    inbox = Inbox()
    runner.submit(a_request(**changes), inbox)
    finished = inbox.wait()
    assert isinstance(finished, Finished), finished
    return finished.images


def refuse(runner: PipelineRunner, **changes: Any) -> Failed:
    inbox = Inbox()
    runner.submit(a_request(**changes), inbox)
    failed = inbox.wait()
    assert isinstance(failed, Failed)
    return failed


def tensors_of(image: EncodedImage) -> dict[str, torch.Tensor]:
    assert image.trajectory is not None
    return safetensors.torch.load(image.trajectory.tensors)


def record(loaded: LoadedModel, **changes: Any) -> tuple[list[Image.Image | None], Trajectory]:
    """Outside of an engine."""
    request = a_request(trajectory=TENSORS, **changes)
    trajectory = trajectory_of(request, TrajectoryRoom())
    assert trajectory is not None
    with torch.inference_mode():
        return make_images(loaded, request, trajectory=trajectory), trajectory


def plain_latents(pipeline: Any, **arguments: Any) -> list[torch.Tensor]:
    """What diffusers' own callback is given."""
    seen: list[torch.Tensor] = []

    def step_ended(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        seen.append(values["latents"].clone())
        return {}

    pipeline(**arguments, callback_on_step_end=step_ended)
    return seen


@pytest.mark.parametrize("wanted", [IMAGES, TENSORS])
@pytest.mark.parametrize("step_cache", [None, StepCacheUse()])
def test_the_images_keep_every_byte(
    runner: PipelineRunner, wanted: TrajectoryRequest, step_cache: StepCacheUse | None
):
    settings: dict[str, Any] = {"n": 2, "num_inference_steps": 8, "step_cache": step_cache}
    alone, watched = serve(runner, **settings), serve(runner, **settings, trajectory=wanted)

    assert [image.data for image in watched] == [image.data for image in alone]
    assert all(image.trajectory is None for image in alone)
    assert all(image.trajectory is not None for image in watched)


def test_tensors_are_those_that_diffusers_steps_through(runner: PipelineRunner, tiny_folder: Path):
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0}
    images = serve(runner, n=2, trajectory=TENSORS, **settings)
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    # The same memory layout, which decides which kernels run.
    plain.unet.to(memory_format=torch.channels_last)
    clean: list[torch.Tensor] = []
    step = plain.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        clean.append(made[1])
        return made

    plain.scheduler.step = watched
    made = plain_latents(
        plain,
        prompt="red heart",
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(3 + i) for i in range(2)],
        **settings,
    )

    for index, image in enumerate(images):
        tensors = tensors_of(image)
        after = torch.cat([tensors["x_t"][1:], tensors["latents"][None]])
        assert torch.equal(after, torch.stack([latents[index] for latents in made]))
        assert torch.equal(tensors["timesteps"], plain.scheduler.timesteps)
        predicted = torch.stack([x_0[index] for x_0 in clean])
        assert torch.allclose(tensors["x_0"], predicted, atol=1e-5)


def test_an_image_of_several_has_the_trajectory_that_it_has_alone(runner: PipelineRunner):
    _, second = serve(runner, n=2, trajectory=TENSORS, reproducible=True)
    (alone,) = serve(runner, seed=4, trajectory=TENSORS, reproducible=True)

    both = tensors_of(second), tensors_of(alone)
    assert both[0].keys() == both[1].keys() == {"steps", "timesteps", "x_t", "x_0", "latents"}
    assert all(torch.allclose(both[0][name], both[1][name], atol=1e-4) for name in both[0])


def test_the_file_says_what_makes_it_again_and_has_the_same_bytes_then(runner: PipelineRunner):
    first, again = (serve(runner, trajectory=TENSORS)[0].trajectory for _ in range(2))

    assert first is not None
    assert first == again
    size = int.from_bytes(first.tensors[:8], "little")
    header = json.loads(first.tensors[8 : 8 + size])
    parameters = json.loads(header["__metadata__"]["parameters"])
    assert (parameters["seed"], parameters["scheduler"]) == (3, "DDIMScheduler")
    assert "trajectory" not in parameters


def test_every_second_step_is_that_of_all_of_them(runner: PipelineRunner):
    (all_steps,) = serve(runner, num_inference_steps=5, trajectory=TENSORS)
    wanted = TrajectoryRequest(TrajectoryFormat.SAFETENSORS, every=2)
    (some,) = serve(runner, num_inference_steps=5, trajectory=wanted)

    every, thinned = tensors_of(all_steps), tensors_of(some)
    assert thinned["steps"].tolist() == [1, 3, 5]
    for name in ("timesteps", "x_t", "x_0"):
        assert torch.equal(thinned[name], every[name][::2])
    assert torch.equal(thinned["latents"], every["latents"])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_images_show_static_that_turns_into_the_image(runner: PipelineRunner, scheduler: str):
    (image,) = serve(
        runner,
        num_inference_steps=6,
        scheduler=scheduler,
        trajectory=IMAGES,
        output_format=OutputFormat.WEBP,
    )

    assert image.trajectory is not None
    assert image.trajectory.media_type == "image/webp"
    steps = image.trajectory.steps
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    timesteps = [step.timestep for step in steps]
    assert timesteps == sorted(timesteps, reverse=True)
    files = [file for step in steps for file in (step.x_t, step.x_0)]
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(64, 64)}
    assert len(set(files)) == len(files)


def test_packed_latents_of_flux_are_raw_in_tensors_and_unpacked_in_images(tmp_path: Path):
    folder = save_tiny_flux(tmp_path / "model")
    model = load_model("flux", folder, dtype="float32")
    side = model.capabilities.sizes.native
    settings: dict[str, Any] = {"width": side, "height": side, "num_inference_steps": 3}
    scheduler = model.capabilities.default_scheduler
    _, tensors = record(model, model="flux", scheduler=scheduler, **settings)
    plain = FluxPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    made = plain_latents(
        plain,
        prompt="red heart",
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(3)],
        **settings,
    )

    loaded = safetensors.torch.load(tensors.encode(0).tensors)
    after = torch.cat([loaded["x_t"][1:], loaded["latents"][None]])
    assert torch.equal(after, torch.cat(made))

    request = a_request(model="flux", scheduler=scheduler, trajectory=IMAGES, **settings)
    shown = trajectory_of(request, TrajectoryRoom())
    assert shown is not None
    with torch.inference_mode():
        make_images(model, request, trajectory=shown)
    sizes = {Image.open(io.BytesIO(step.x_t)).size for step in shown.encode(0).steps}
    assert sizes == {(side, side)}


def test_pixels_are_recorded_where_there_is_no_autoencoder(tmp_path: Path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    DDPMPipeline(unet, DDPMScheduler(100)).save_pretrained(tmp_path / "pixels")
    model = load_model("pixels", tmp_path / "pixels", dtype="float32")
    (image,), trajectory = record(
        model,
        task=Task.UNCONDITIONAL,
        prompt="",
        guidance_scale=0.0,
        width=16,
        height=16,
        num_inference_steps=4,
        scheduler="DDPMScheduler",
    )

    tensors = safetensors.torch.load(trajectory.encode(0).tensors)
    assert tensors["x_t"].shape == (4, 3, 16, 16)
    assert image is not None
    levels = (tensors["latents"] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    drawn = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 16, 3)
    assert torch.equal((levels * 255).round().to(torch.uint8), drawn)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_as_many_steps_are_recorded_as_is_said(steps: int, every: int):
    wanted = TrajectoryRequest(every=every)
    recorded = [step for step in range(1, steps + 1) if wanted.records(step)]

    assert len(recorded) == wanted.recorded(steps)
    assert recorded[0] == 1


@given(
    st.sampled_from(TrajectoryFormat), st.integers(1, 1000), st.integers(1, 8), st.integers(1, 2048)
)
def test_what_is_refused_says_what_would_do(
    format_: TrajectoryFormat, steps: int, n: int, side: int
):
    step_bytes = n * side * side
    wanted = TrajectoryRequest(format_)
    try:
        trajectory_limits.check_trajectory_bytes(wanted, steps, step_bytes)
        assert steps * step_bytes <= trajectory_limits.MAX_TRAJECTORY_BYTES
    except InvalidRequestError as error:
        assert step_bytes <= trajectory_limits.MAX_TRAJECTORY_BYTES
        least = int(error.message.split("at least ")[1].split(",")[0])
        thinned = TrajectoryRequest(format_, every=least)
        trajectory_limits.check_trajectory_bytes(thinned, steps, step_bytes)
        with pytest.raises(InvalidRequestError, match=f"at least {least}, got {least - 1}"):
            trajectory_limits.check_trajectory_bytes(
                TrajectoryRequest(format_, every=least - 1), steps, step_bytes
            )


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"num_inference_steps": 101},
            "trajectory.every",
            "trajectory.every must be at least 3, got 1: images of at most 50 steps are returned, "
            "and there are 101",
        ),
        (
            {"trajectory": TrajectoryRequest(every=0)},
            "trajectory.every",
            "trajectory.every must be 1 to 1000, got 0",
        ),
        (
            {"n": 8, "num_inference_steps": 50, "width": 512, "height": 512},
            "trajectory.every",
            "trajectory.every must be at least 10, got 1: 50 recorded steps take 629145600 bytes, "
            "the limit is 67108864 bytes",
        ),
        (
            {"hires": Hires(2, 0.5, 4, 128, 128)},
            "trajectory",
            "trajectory and hires exclude each other: leave one of them out",
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_field_value_and_limit(
    changes: dict[str, Any], field: str, message: str
):
    limits = ModelCapabilities("tiny", "", SizeRange(64, 64, 512, 8), ("DDIMScheduler",), "")
    with pytest.raises(InvalidRequestError) as refused:
        check_trajectory(a_request(**{"trajectory": IMAGES} | changes), limits)

    assert (refused.value.field, refused.value.message) == (field, message)


def test_models_whose_steps_cannot_be_shown_have_tensors_only(tiny: LoadedModel):
    limits = replace(tiny.capabilities, previews=False)

    check_request(a_request(trajectory=TENSORS), limits)
    with pytest.raises(InvalidRequestError, match="must be 'safetensors', got 'images'"):
        check_request(a_request(trajectory=IMAGES), limits)


def test_calls_are_counted_where_a_scheduler_makes_two_of_a_step(runner: PipelineRunner):
    failed = refuse(
        runner, num_inference_steps=40, scheduler="HeunDiscreteScheduler", trajectory=IMAGES
    )

    assert failed.error.message.endswith("at most 50 steps are returned, and there are 79")


def test_latents_that_would_be_too_large_are_refused_at_the_first_step(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
):
    # Of one step: 4 channels of 8 x 8, in float32, twice.
    monkeypatch.setattr(trajectory_limits, "MAX_TRAJECTORY_BYTES", 3 * 2048)
    failed = refuse(runner, num_inference_steps=10, trajectory=TENSORS)

    assert isinstance(failed.error, InvalidRequestError)
    assert failed.error.message == (
        "trajectory.every must be at least 4, got 1: 10 recorded steps take 20480 bytes, the limit "
        "is 6144 bytes"
    )


def test_bytes_are_held_from_the_first_step_to_the_end_and_bounded(tiny: LoadedModel):
    room = TrajectoryRoom(most_bytes=3 * 2048)
    first, second = (trajectory_of(a_request(trajectory=TENSORS), room) for _ in range(2))
    assert first is not None
    assert second is not None
    with torch.inference_mode():
        make_images(tiny, first.request, trajectory=first)
        assert room.held_bytes == 2 * 2048
        with pytest.raises(ServerFullError, match="hold 4096 bytes, the limit is 6144"):
            make_images(tiny, second.request, trajectory=second)
        first.release()
        first.release()
        assert room.held_bytes == 0
        make_images(tiny, second.request, trajectory=second)
    assert room.held_bytes == 2 * 2048


@pytest.mark.parametrize("n", [1, 9])
def test_every_end_gives_the_room_back(runner: PipelineRunner, n: int):
    inbox = Inbox()
    runner.submit(a_request(n=n, trajectory=TENSORS), inbox)
    inbox.wait()

    assert runner.trajectory_room.held_bytes == 0


def test_a_pipeline_whose_steps_are_not_seen_has_no_trajectory(tiny: LoadedModel):
    trajectory = trajectory_of(a_request(trajectory=TENSORS), TrajectoryRoom())
    assert trajectory is not None

    with pytest.raises(InvalidRequestError, match="the steps of model 'tiny' cannot be seen"):
        trajectory.finish()
