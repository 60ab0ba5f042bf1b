"""What is overridden in other libraries must still be there, and mean what it did."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import torch_utils
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.third_party.pinned_noise import NOISE, pinned_randn_tensor
from stepserve.pipelines.modules.third_party.resident_pipelines import copy_class


def test_diffusers_still_has_what_copies_override() -> None:
    assert isinstance(inspect.getattr_static(DiffusionPipeline, "_execution_device"), property)
    free = inspect.signature(DiffusionPipeline.maybe_free_model_hooks)
    assert list(free.parameters) == ["self"], diffusers.__version__
    assert "self.maybe_free_model_hooks()" in inspect.getsource(StableDiffusionPipeline.__call__)


def test_diffusers_still_draws_noise_by_the_function_that_is_replaced() -> None:
    for drawing in (StableDiffusionPipeline.prepare_latents, DDIMScheduler.step):
        assert NOISE in drawing.__code__.co_names, diffusers.__version__
    taken = list(inspect.signature(torch_utils.randn_tensor).parameters)
    assert list(inspect.signature(pinned_randn_tensor).parameters) == taken


def test_a_copy_keeps_the_hooks_of_shared_modules(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers would put offloading hooks on anew, inside what parks."""
    freed: list[object] = []
    cls = type(tiny.pipeline)
    monkeypatch.setattr(cls, "maybe_free_model_hooks", freed.append)
    copied = tiny.factory.copy()
    assert type(copied).__name__ == cls.__name__
    assert isinstance(copied, cls)
    copied.maybe_free_model_hooks()
    assert freed == []
    assert copied._execution_device == torch.device("cpu")
    assert copy_class(tiny.pipeline).__name__ == cls.__name__
