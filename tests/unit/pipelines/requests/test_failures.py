"""Settings that cannot be done are the request's fault, and its answer names them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from stepserve.domain.errors import GenerationFailedError, InvalidRequestError, StepserveError
from stepserve.domain.events import Failed
from stepserve.domain.models import StepRange
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.probing.probed_tasks import with_probed_steps
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import (
    STABLE_DIFFUSION,
    UNTRIED,
    Inbox,
    a_request,
    changed_call,
    save_tiny_model,
)

SINGULAR = 998
"""Steps in which two of DEIS have the same noise, although more and fewer can be done."""


def a_file() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("sd"), STABLE_DIFFUSION)


@pytest.fixture(scope="module")
def runner(sd_folder: Path) -> Iterator[PipelineRunner]:
    model = load_model("sd", sd_folder, dtype="float32", device="cpu")
    made = PipelineRunner(model, EngineOptions(max_rows=8, max_pending_images=64), None, UNTRIED)
    made.start()
    yield made
    made.stop()


def error_of(runner: PipelineRunner, **changes: Any) -> StepserveError | None:
    inbox = Inbox()
    runner.submit(a_request(**changes), inbox)
    outcome = inbox.wait()
    return outcome.error if isinstance(outcome, Failed) else None


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_more_steps_than_a_scheduler_can_do_are_refused(runner: PipelineRunner, name: str) -> None:
    error = error_of(runner, scheduler=name, num_inference_steps=1000, guidance_scale=1.0)
    assert isinstance(error, InvalidRequestError)
    assert error.field == "num_inference_steps"
    limit = runner.capabilities().steps_of(name)
    assert f"must be 1 to {limit.maximum}, got 1000 (with scheduler {name})" in error.message


def test_a_count_between_others_that_cannot_be_done_is_refused_too(tiny: LoadedModel) -> None:
    """Limits are a range; that this count is none of it is seen when it is asked for."""
    assert tiny.capabilities.steps_of("DEISMultistepScheduler").maximum == 1000
    with pytest.raises(InvalidRequestError, match="998 cannot be done by DEISMultistepScheduler"):
        make_images(
            tiny, a_request(scheduler="DEISMultistepScheduler", num_inference_steps=SINGULAR)
        )


@pytest.fixture
def alone(tiny_folder: Path) -> LoadedModel:
    return load_model("tiny", tiny_folder, dtype="float32", device="cpu")


def test_who_cannot_do_its_steps_alone_is_to_blame(
    alone: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = a_request()

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise IndexError("index 7 is out of bounds")

    # As if the ends had been fine.
    make_images(alone, request)
    monkeypatch.setattr(alone.schedulers["DDIMScheduler"], "step", step)
    with pytest.raises(
        InvalidRequestError, match=r"by DDIMScheduler \(IndexError: index 7"
    ) as told:
        make_images(alone, request)
    assert told.value.field == "num_inference_steps"
    assert "choose another number, or another scheduler" in told.value.message


def test_who_can_do_its_steps_alone_is_not(
    alone: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler raises because of what the network said, which is the server's fault."""
    plain = cast(Any, alone.schedulers["DDIMScheduler"]).step

    def step(self: Any, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if model_output.shape[-1] > 2:
            raise ValueError("this network is not mine")
        return plain(self, model_output, *args, **kwargs)

    monkeypatch.setattr(alone.schedulers["DDIMScheduler"], "step", step)
    with pytest.raises(ValueError, match="not mine"):
        make_images(alone, a_request())


def test_numbers_that_overflow_in_the_network_are_the_servers_fault(alone: LoadedModel) -> None:
    alone.pipeline.unet.conv_out.register_forward_hook(lambda m, a, output: output * torch.nan)
    with pytest.raises(GenerationFailedError, match="not finite"):
        make_images(alone, a_request())


class TwoSteps:
    """As Sana Sprint: its own checks refuse any other number of steps."""

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        if self.wanted != 2:
            raise ValueError("Intermediate timesteps for SCM is not supported when steps != 2.")

    def __call__(self, *args: Any, num_inference_steps: int = 2, **kwargs: Any) -> Any:
        self.wanted = num_inference_steps
        self.check_inputs()
        return super().__call__(  # type: ignore[misc]
            *args, num_inference_steps=num_inference_steps, **kwargs
        )


def two_steps(model: LoadedModel) -> LoadedModel:
    capabilities = replace(model.capabilities, default_num_inference_steps=2)
    return changed_call(replace(model, capabilities=capabilities), TwoSteps)


def test_steps_that_a_pipeline_itself_refuses_are_not_told(tiny: LoadedModel) -> None:
    told = with_probed_steps(two_steps(tiny)).capabilities
    assert {told.steps_of(name) for name in told.schedulers} == {StepRange(2, 2)}
    assert told.default_num_inference_steps == 2
    # What begins with four steps of a higher order can do none of these.
    assert set(tiny.capabilities.schedulers) - set(told.schedulers) == {"PNDMScheduler"}
    assert with_probed_steps(tiny) is tiny


def test_a_pipelines_own_refusal_is_answered_as_one(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequestError, match="refuses: Intermediate timesteps"):
        make_images(two_steps(tiny), a_request(num_inference_steps=3))


@pytest.mark.parametrize("task", [Task.IMAGE_TO_IMAGE, Task.INPAINTING])
@pytest.mark.parametrize("strength", [0.01, 0.1, 0.34, 0.99, 1.0])
def test_any_strength_is_done_or_refused(
    runner: PipelineRunner, task: Task, strength: float
) -> None:
    files: dict[str, Any] = {"images": (a_file(),)}
    if task is Task.INPAINTING:
        files["mask"] = a_file()
    done = 0
    for scheduler in runner.capabilities().schedulers:
        for steps in (1, 2, 3, 5):
            error = error_of(
                runner,
                scheduler=scheduler,
                num_inference_steps=steps,
                strength=strength,
                task=task,
                guidance_scale=1.0,
                **files,
            )
            assert error is None or isinstance(error, InvalidRequestError), (scheduler, steps)
            done += error is None
    # Of five steps a fifth is one.
    assert (done > 0) is (strength >= 0.2)
