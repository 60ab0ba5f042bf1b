"""Requests of different sizes, prompts and images share forwards that fill rows up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families.catalogue import FAMILIES
from families.examine import make_probe_requests, results_alone
from families.family import Family, Variation
from stepserve.engine.loop.batcher import Batcher
from stepserve.pipelines.modules.parking import Z_IMAGE_ROW_TOKENS
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    check_sharing,
    run_at_once,
)
from stepserve.pipelines.probing.sharing_plan import (
    DEPENDENT_LENGTHS,
    SharingPlan,
    plan_sharing,
)

FLOAT64_BOUND = 1e-6
FLOAT32_BOUND = 2e-4
MOST_TOKENS = 96
PROMPTS = ("a red heart", 4 * "a big apple in the lake ", 8 * "a blue bird on a cold stone ")
MAX_ROWS = 16
SIZES = ((16, 16), (32, 24), (24, 32), (16, 48))

pytestmark = pytest.mark.usefixtures("one_thread")


def of_any_length(family: Family) -> Family:
    """The same family with prompts and images of different lengths."""

    def arguments(pipeline: Any, variation: Variation) -> dict[str, Any]:
        width, height = SIZES[variation.index % len(SIZES)]
        usual = family.arguments(pipeline, variation)
        if isinstance(usual.get("image"), torch.Tensor):
            usual["image"] = variation.tensor(1, 3, height, width)
        prompt = PROMPTS[variation.index % len(PROMPTS)]
        sized = {"width": width, "height": height, "max_sequence_length": MOST_TOKENS}
        return {**usual, **sized, "prompt": prompt}

    return replace(family, arguments=arguments)


CASES = [
    (name, dtype)
    for name in ("Z-Image", "Z-Image, image to image", "Z-Image Omni")
    for dtype in (torch.float64, torch.float32)
    if FAMILIES[name].float64 or dtype is torch.float32
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_all_lengths_share_and_each_gets_what_it_gets_alone(name: str, dtype: torch.dtype) -> None:
    family = of_any_length(FAMILIES[name])
    pipeline = family.build()
    if dtype is torch.float64:
        pipeline = pipeline.to(dtype)
    report = check_sharing(pipeline, make_probe_requests(family, pipeline), options=ENOUGH_ROWS)
    assert report.objection == ""
    assert report.difference <= (FLOAT64_BOUND if dtype is torch.float64 else FLOAT32_BOUND)
    # Of four requests with 2, 3, 4 and 5 steps at most 2.8 calls share a forward.
    assert report.calls_per_forward > 2.4


def planned(pipeline: Any, **options: Any) -> SharingPlan:
    probes = make_probe_requests(FAMILIES["Z-Image"], pipeline)[:2]
    with torch.no_grad():
        return plan_sharing(pipeline, probes, MAX_ROWS, **options)


def at_once(pipeline: Any, plan: SharingPlan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What requests of any length get alone, and together."""
    probes = make_probe_requests(of_any_length(FAMILIES["Z-Image"]), pipeline)
    options, batcher = plan.parking(ENOUGH_ROWS), Batcher(MAX_ROWS)
    with torch.no_grad():
        listeners = run_at_once(batcher, pipeline, probes, [0] * len(probes), options)
    assert batcher.counters.calls > batcher.counters.forwards
    return results_alone(pipeline, probes, options), [listener.result for listener in listeners]


def test_where_lengths_are_mixed_it_is_told_that_bytes_depend_on_the_load() -> None:
    plan = planned(FAMILIES["Z-Image"].build())
    assert plan == SharingPlan(same_bytes=False, remark=DEPENDENT_LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_that_are_kept_apart_have_the_same_bytes_at_any_load(dtype: torch.dtype) -> None:
    pipeline = FAMILIES["Z-Image"].build().to(dtype)
    plan = planned(pipeline, mix_lengths=False)
    assert plan.same_bytes
    for alone, together in zip(*at_once(pipeline, plan), strict=True):
        assert torch.equal(alone, together)


def test_lengths_that_are_kept_apart_share_no_forward() -> None:
    pipeline = FAMILIES["Z-Image"].build()
    usual, lengths = pipeline.transformer.forward, []

    def forward(x: list[torch.Tensor], t: Any, cap_feats: list[torch.Tensor], **more: Any) -> Any:
        pairs = zip(x, cap_feats, strict=True)
        lengths.append({(count["x"](image), count["cap_feats"](text)) for image, text in pairs})
        return usual(x, t, cap_feats, **more)

    count = Z_IMAGE_ROW_TOKENS
    pipeline.transformer.forward = forward
    at_once(pipeline, SharingPlan(mixes_lengths=False))
    # The texts of a request with guidance have two lengths, which go with any of the same two.
    assert max(map(len, lengths)) == 2
    lengths.clear()
    at_once(pipeline, SharingPlan())
    assert max(map(len, lengths)) > 2
