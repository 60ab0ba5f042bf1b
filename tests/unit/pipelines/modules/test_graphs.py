"""Recorded forwards: what is replayed, what stays eager. A recording that runs on any device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from optree import PyTreeSpec
from stepserve.pipelines.modules.cuda_graphs import Forward, GraphedForward, Recording


class Denoiser(torch.nn.Module):
    """Doubles its sample, and counts how often its Python ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def forward(
        self, sample: torch.Tensor, timestep: Any, scale: float = 2.0, extra: Any = None
    ) -> UNet2DConditionOutput:
        self.ran += 1
        return UNet2DConditionOutput(sample=sample * scale + timestep)


class Fixed:
    """As a CUDA graph: fixed places for arguments and output, written anew at each replay."""

    def __init__(self, forward: Forward, leaves: Sequence[Any], structure: PyTreeSpec) -> None:
        self.places = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = cast(Any, structure.unflatten(self.places))
        self.run = lambda: Denoiser.forward(Denoiser(), *args, **kwargs)
        forward(*args, **kwargs)
        self.replayed = 0

    def replay(self, leaves: Sequence[Any]) -> Any:
        self.replayed += 1
        for place, leaf in zip(self.places, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                place.copy_(leaf)
        return self.run()


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def graphed(record: Any = Fixed, most: int = 8) -> tuple[Denoiser, GraphedForward]:
    module = Denoiser()
    module.forward = forward = GraphedForward(module.forward, record, most)
    return module, forward


def test_the_third_forward_of_a_shape_runs_no_python_and_gives_the_same_numbers() -> None:
    module, forward = graphed()
    for number in range(5):
        sample = torch.full((2, 3), float(number))
        assert torch.equal(
            module(sample, torch.tensor([1, 2]).reshape(2, 1)).sample,
            2 * sample + torch.tensor([[1.0], [2.0]]),
        )
    assert forward.recorded == 1
    # Once eagerly, then to record and to compare.
    assert module.ran == 3


def test_what_has_another_shape_or_another_value_is_another_forward() -> None:
    module, forward = graphed()
    sample = torch.ones(2, 3)
    for _ in range(2):
        assert module(sample, 1.0).sample[0, 0] == 3
        assert module(sample, 1.0, scale=5.0).sample[0, 0] == 6
        assert module(sample, 2.0).sample[0, 0] == 4
        assert module(sample[:1], 1.0).sample.shape == (1, 3)
        assert module(sample.double(), 1.0).sample.dtype is torch.float64
        assert module(torch.ones(3, 2).T, 1.0).sample.shape == (2, 3)
    assert forward.recorded == 6


def test_only_the_latest_used_are_kept() -> None:
    module, forward = graphed(most=2)
    for rows in (1, 2, 3):
        for _ in range(2):
            module(torch.ones(rows, 3), 0.0)
    assert forward.recorded == 2
    before = module.ran
    module(torch.ones(3, 3), 0.0)
    assert module.ran == before


class Wrong(Fixed):
    def replay(self, leaves: Sequence[Any]) -> Any:
        return UNet2DConditionOutput(sample=super().replay(leaves).sample + 1)


def refuse(forward: Forward, leaves: Sequence[Any], structure: PyTreeSpec) -> Recording:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "why"), [(Wrong, "its graph gives other numbers"), (refuse, "not permitted")]
)
def test_what_cannot_be_recorded_stays_eager_and_is_not_tried_again(
    record: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, forward = graphed(record)
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            assert module(torch.ones(2, 3), 0.0).sample[0, 0] == 2
    assert (forward.recorded, forward.refused) == (0, 1)
    (record_of_log,) = caplog.records
    assert why in record_of_log.message


def test_gradients_and_objects_stay_eager() -> None:
    module, forward = graphed()
    for _ in range(3):
        with torch.enable_grad():
            sample = torch.ones(2, 3, requires_grad=True)
            module(sample, 0.0).sample.sum().backward()
            assert sample.grad is not None
        module(torch.ones(2, 3), 0.0, extra=object())
    assert forward.recorded == 0


def test_what_had_to_make_room_is_eager_once_before_it_is_recorded_again() -> None:
    module, forward = graphed(most=1)
    for rows in (1, 1, 2, 2):
        module(torch.ones(rows, 3), 0.0)
    before = module.ran
    module(torch.ones(1, 3), 0.0)
    assert module.ran == before + 1
    module(torch.ones(1, 3), 0.0)
    assert forward.recorded == 1
    before = module.ran
    module(torch.ones(1, 3), 0.0)
    assert module.ran == before


def test_a_request_whose_numbers_overflowed_refuses_no_shape() -> None:
    module, forward = graphed()
    for _ in range(2):
        module(torch.full((2, 3), float("nan")), 0.0)
    assert (forward.recorded, forward.refused) == (1, 0)


def test_where_memory_runs_out_a_shape_is_tried_again_later() -> None:
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def scarce(forward: Forward, leaves: Sequence[Any], structure: PyTreeSpec) -> Recording:
        if failures:
            raise failures.pop()
        return Fixed(forward, leaves, structure)

    module, forward = graphed(scarce)
    for _ in range(4):
        assert module(torch.ones(2, 3), 0.0).sample[0, 0] == 2
    assert (forward.recorded, forward.refused) == (1, 0)
