"""Requests with and without control share forwards of the base model, and get the same images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from families.catalogue import FAMILIES
from families.family import Family, Variation, resident
from stepserve.engine.batch_invariance import run_together
from stepserve.engine.calls.residuals import join_residuals
from stepserve.engine.calls.stacking import stack, tensors_in
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    ProbeRequest,
    SharingReport,
    check_sharing,
)
from torch import Tensor

FLOAT64_BOUND = 1e-6
FLOAT32_BOUND = 2e-4
# Families with control, and the family over whose modules the control works.
BASES = {
    "Stable Diffusion with a ControlNet": "Stable Diffusion",
    "Stable Diffusion with a ControlNet, inpainting": "Stable Diffusion, inpainting",
    "Stable Diffusion with a T2I-Adapter": "Stable Diffusion",
    "Stable Diffusion XL with a ControlNet": "Stable Diffusion XL",
    "Stable Diffusion XL with a union ControlNet": "Stable Diffusion XL",
    "Stable Diffusion 3 with a ControlNet": "Stable Diffusion 3",
    "FLUX with a ControlNet": "FLUX",
    "FLUX with a union ControlNet": "FLUX",
    "Qwen-Image with a ControlNet": "Qwen-Image",
    "Hunyuan-DiT with a ControlNet": "Hunyuan-DiT",
    "Sana with a ControlNet": "Sana",
}
STEERING = ("controlnet", "adapter")

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_pipeline(base: Family, controlled: Any) -> Any:
    """The base family's pipeline over the modules of the controlled one."""
    cls: Any = type(resident(base))
    parts = {name: part for name, part in controlled.components.items() if name not in STEERING}
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(family: Family, pipeline: Any, variation: Variation) -> Tensor:
    """A call with two of the schedulers, in turn, where the family has several."""
    copied = copy_pipeline(pipeline)
    if family.schedulers:
        scheduler: Any = getattr(diffusers, family.schedulers[variation.index % 2])
        copied.scheduler = scheduler.from_config(copied.scheduler.config)
    output = family.result(copied(**family.arguments(copied, variation)))
    return output / output.abs().max()


def probes_of(name: str, dtype: torch.dtype) -> tuple[Any, list[ProbeRequest]]:
    """Two requests with control and two without, over the same modules."""
    family, base = FAMILIES[name], FAMILIES[BASES[name]]
    pipeline = family.build().to(dtype)
    plain = plain_pipeline(base, pipeline)
    one, two, three, four = family.variations()
    return pipeline, [
        partial(call, family, pipeline, one),
        partial(call, base, plain, two),
        partial(call, family, pipeline, three),
        partial(call, base, plain, four),
    ]


def at_once_and_alone(name: str, dtype: torch.dtype) -> SharingReport:
    pipeline, probes = probes_of(name, dtype)
    return check_sharing(pipeline, probes, options=ENOUGH_ROWS)


@pytest.mark.parametrize("name", BASES)
def test_with_and_without_control_at_once_is_what_each_is_alone(name: str) -> None:
    rounded, half = (at_once_and_alone(name, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [report.objection for report in (rounded, half)] == ["", ""]
    assert rounded.difference <= FLOAT32_BOUND < rounded.separation / 100
    if FAMILIES[name].float64:
        exact = at_once_and_alone(name, torch.float64)
        assert (exact.objection, exact.difference <= FLOAT64_BOUND) == ("", True)


@pytest.mark.parametrize("name", BASES)
def test_with_and_without_control_share_the_denoisers_forward(name: str) -> None:
    pipeline, probes = probes_of(name, torch.float32)
    with parked_at(Stage.DENOISE, pipeline, probes, ENOUGH_ROWS) as groups:
        assert [len(group) for group in groups] == [4]
        assert [bool(call.residuals) for call in groups[0]] == [True, False, True, False]
        shared = run_together(groups[0])
        alone = [run_together([call])[0] for call in groups[0]]
        for together, apart in zip(shared, alone, strict=True):
            for one, other in zip(tensors_in(together), tensors_in(apart), strict=True):
                assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_what_fills_rows_up_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """In a forward of the same rows: kernels of no processor round otherwise then."""
    pipeline, probes = probes_of(name, dtype)
    with parked_at(Stage.DENOISE, pipeline, probes, ENOUGH_ROWS) as groups:
        (calls,) = groups
        controlled, plain = calls[0], calls[1]
        args, kwargs = stack([plain])
        residuals = join_residuals([{}, controlled.residuals], [plain.rows, 0], only_first)
        untouched = tensors_in(plain.method.run(*args, **kwargs))
        filled = tensors_in(plain.method.run(*args, **kwargs, **residuals))
        assert untouched
        for one, other in zip(untouched, filled, strict=True):
            assert torch.equal(
                one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
            )


def only_first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]
