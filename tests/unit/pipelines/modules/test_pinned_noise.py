"""Timesteps and noise that stay on the host change no number. The device is the CPU as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.modules.third_party import pinned_noise
from stepserve.pipelines.modules.third_party.pinned_noise import (
    can_keep_on_host,
    on_device,
    on_host,
)
from stepserve.pipelines.requests.call import call_pipeline
from tiny_model import a_request, save_tiny_model


def noting(tensors: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that gives its first argument back, and notes it."""

    def note(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    return note


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model("tiny", save_tiny_model(tmp_path_factory.mktemp("tiny")), "float32", "cpu")


def test_every_scheduler_makes_the_same_latents_with_its_timesteps_on_the_host(
    model: LoadedModel,
) -> None:
    factories = [PipelineFactory(model.pipeline, model.schedulers, kept) for kept in (False, True)]
    usual, on_host_factory = [
        LoadedModel(model.pipeline, model.capabilities, model.schedulers, model.prompt_meter, one)
        for one in factories
    ]
    assert len(model.schedulers) > 10
    for name in model.schedulers:
        request = a_request(id=name, scheduler=name, num_inference_steps=4)
        with torch.no_grad():
            wanted = call_pipeline(usual, request, output_type="latent")
            assert torch.equal(
                call_pipeline(on_host_factory, request, output_type="latent"), wanted
            )


class Asked(DDIMScheduler):
    """Remembers the device it was asked to work on; there is none here."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.asked_for = device
        super().set_timesteps(num_inference_steps, "cpu")


def test_timesteps_come_to_the_host_once_they_were_worked_out_where_pipelines_ask(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls in model.schedulers.values():
        kept = on_host(cls)
        assert kept.__name__ == cls.__name__
        # Pipelines look at it, to see whether they may give timesteps of their own.
        ours, theirs = (inspect.signature(c.set_timesteps) for c in (kept, cls))  # type: ignore[attr-defined]
        assert ours == theirs
    scheduler: Any = on_host(Asked).from_config(model.pipeline.scheduler.config)  # type: ignore[attr-defined]
    brought: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", noting(brought))
    scheduler.set_timesteps(4, device="cuda")
    # Sigmas stay: some schedulers compute with them on the device.
    assert scheduler.asked_for == "cuda"
    assert [t.tolist() for t in brought] == [scheduler.timesteps.tolist()]


def test_noise_is_the_same_and_goes_by_way_of_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(pinned_noise, "_bring", noting(pinned))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    draw = pinned_noise.pinned_randn_tensor
    noise = draw((2, 3), generators, device=torch.device("cuda"), dtype=torch.bfloat16)
    wanted = [
        torch.randn(1, 3, generator=g.manual_seed(g.initial_seed()), dtype=torch.bfloat16)
        for g in generators
    ]
    assert torch.equal(noise, torch.cat(wanted))
    assert len(pinned) == 1
    # On the CPU it is diffusers' own.
    draw((2, 3), generators, device=torch.device("cpu"))
    assert len(pinned) == 1


def test_it_is_for_cuda_and_pipelines_that_were_tried(model: LoadedModel) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert can_keep_on_host(model.pipeline, cuda)
    assert not can_keep_on_host(model.pipeline, cpu)
    assert not can_keep_on_host(object(), cuda)
    assert StableDiffusionPipeline.__name__ == type(model.pipeline).__name__


class Where(torch.nn.Module):
    def forward(self, sample: torch.Tensor, *, inner: dict[str, Any]) -> tuple[str, str]:
        return sample.device.type, inner["a"].device.type


def test_arguments_are_brought_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # No memory can be pinned where there is no accelerator.
    monkeypatch.setattr(pinned_noise, "from_pinned", lambda tensor: tensor)
    module = Where()
    module.forward = on_device(module.forward, torch.device("meta"))
    sample = torch.ones(1)
    assert module(sample, inner={"a": sample}) == ("meta", "meta")
    assert module(sample.to("meta"), inner={"a": sample, "b": 1}) == ("meta", "meta")


def test_the_folder_is_one_that_the_service_could_serve(tmp_path: Path) -> None:
    assert not load_model("tiny", save_tiny_model(tmp_path), "float32", "cpu").cuda_graphs
