"""What is overridden in other libraries must still be there, and mean what it did."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
)
from diffusers.utils import torch_utils
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.third_party.pinned_noise import NOISE, pinned_randn_tensor
from stepserve.pipelines.modules.third_party.qwen_text_counts import (
    CALLERS,
    COUNT,
    leave_counts_out,
)
from stepserve.pipelines.modules.third_party.resident_pipelines import copy_class
from torch.overrides import TorchFunctionMode


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


class HostNumbers(TorchFunctionMode):
    """Notes what makes a tensor of numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.as_tensor, torch.tensor):
            self.made.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_masked_forward_of_a_qwen_image_copies_no_number_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for caller in CALLERS:
        # Put back at the end.
        monkeypatch.setattr(caller, COUNT, getattr(caller, COUNT))
    transformer = QwenImageTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )

    def forward() -> tuple[torch.Tensor, list[str]]:
        states = torch.ones(2, 4, 4), torch.ones(2, 5, 8)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        timestep = torch.ones(2)
        with torch.no_grad(), HostNumbers() as seen:
            output = transformer(*states, mask, timestep, [[(1, 2, 2)]] * 2, return_dict=False)
        return output[0], seen.made

    counted, made = forward()
    leave_counts_out()
    uncounted, made_without = forward()
    assert (made, made_without) == (["as_tensor"], [])
    assert torch.equal(counted, uncounted)


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
