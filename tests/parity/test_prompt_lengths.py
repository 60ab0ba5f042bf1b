"""Requests whose prompts have other lengths share forwards, and get what each gets alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from families.catalogue import FAMILIES
from families.examine import make_probe_requests, results_alone
from families.family import Family, resident
from families.prompt_lengths import (
    MOST_SHARED,
    build_roomy,
    make_wordy_requests,
    measure,
    reason,
)
from random_requests import random_requests, serve_at_once
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.text_padding import TextPadding, TokenMask
from stepserve.engine.loop.batcher import Batcher
from stepserve.pipelines.modules.parking import ARGUMENT_RULES
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, Watch, run_at_once
from stepserve.pipelines.probing.sharing_plan import plan_sharing
from torch import Tensor

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"
MOST_ROWS = 16
FLOAT64_BOUND = 1e-6
FLOAT32_BOUND = 2e-4
# Whose prompts have no fixed length, and three of those whose pipelines fill them up to one.
ORDINARY = {
    "Bria Fibo Edit",
    "CogView 4",
    "DreamLite, edit",
    "FLUX",
    "JoyImage-Edit",
    "JoyImage-Edit-Plus",
    "Kandinsky 3",
    "Kandinsky 5, image",
    "Latte, text to video",
    "Qwen-Image",
    "Qwen-Image 2.1",
    "Qwen-Image with a ControlNet",
    "Qwen-Image, inpainting",
    "Qwen-Image-Edit",
    "Qwen-Image-Edit-Plus",
    "Stable Diffusion",
    "Wan 2.1, text to video",
    "Z-Image",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if name in ORDINARY else pytest.mark.slow, id=name)
        for name, family in FAMILIES.items()
    ],
)
def test_prompts_of_any_length_share_unless_it_is_said_why_not(family: Family) -> None:
    report = measure(family)
    assert report.objection == ""
    bound = FLOAT64_BOUND if family.float64 else FLOAT32_BOUND
    assert report.difference <= bound
    # Else a mixed-up row would go unseen.
    assert report.separation > 100 * bound
    if reason(family):
        assert report.calls_per_forward < MOST_SHARED
    else:
        assert report.calls_per_forward == MOST_SHARED


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image"])
def test_random_requests_take_half_as_many_forwards(name: str, seed: int) -> None:
    """Prompts, steps, guidance, images and seeds are random, and so is when each arrives."""
    family = FAMILIES[name]
    random = Random(seed)
    arrivals = [random.randint(0, 4) for _ in range(12)]
    served = serve_at_once(resident(family), family, random_requests(12, seed), arrivals)
    assert served.calls >= 2 * served.forwards
    assert max(served.levels) <= 1
    # Else a mixed-up row would go unseen.
    assert served.separation > 10


def test_texts_that_are_not_filled_up_share_where_they_are_equally_long() -> None:
    family = FAMILIES["Qwen-Image"]
    report = measure(family, pads_prompts=False)
    # The negative prompts are.
    assert report.calls_per_forward == 1.5
    assert report.difference == 0


def test_whether_texts_are_filled_up_is_the_operator_s_choice() -> None:
    family = FAMILIES["Qwen-Image"]
    probes = make_probe_requests(family, resident(family))
    with torch.no_grad():
        plans = [
            plan_sharing(resident(family), probes, 8, fix_rows=False, pad_prompts=pad_prompts)
            for pad_prompts in (True, False)
        ]
    assert [plan.pads_prompts for plan in plans] == [True, False]
    assert [plan.parking(ENOUGH_ROWS).pads_prompts for plan in plans] == [True, False]
    # The last bits are others.
    assert plans[0].row_policy != plans[1].row_policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Image",
        "Qwen-Image with a ControlNet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("Bria Fibo Edit", "DreamLite, edit", "JoyImage-Edit-Plus")
        ),
    ],
)
def test_bytes_do_not_depend_on_requests_with_other_prompts(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    pipeline = build_roomy(family, dtype)
    requests = make_wordy_requests(family, pipeline)
    with torch.no_grad():
        plan = plan_sharing(pipeline, requests, MOST_ROWS)
    if not plan.same_bytes:
        pytest.skip(f"rows depend on co-batched ones in {dtype} on this device, whatever they say")
    options = plan.parking(ENOUGH_ROWS)
    by_itself, shared = Watch(pipeline), Watch(pipeline)
    with by_itself.watching():
        alone = results_alone(pipeline, requests, options)
    with torch.no_grad(), shared.watching():
        together = run_at_once(Batcher(MOST_ROWS), pipeline, requests, [0, 0, 0], options)
    assert by_itself.forwards == MOST_SHARED * shared.forwards
    pairs = zip(alone, together, strict=True)
    assert [torch.equal(one, other.result) for one, other in pairs] == [True] * len(alone)


class Everything(TokenMask):
    """A mask that keeps nothing out."""

    def write(self, arguments: Mapping[str, Any], mask: Tensor, text: Tensor) -> dict[str, Any]:
        return {self.name: mask.new_ones(mask.shape)}


def test_text_that_was_filled_in_and_counted_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padding = TextPadding(Everything("encoder_hidden_states_mask"))
    rules = ArgumentRules(row_lists=frozenset({"img_shapes"}), text=(padding,))
    monkeypatch.setitem(ARGUMENT_RULES, "QwenImageTransformer2DModel", rules)
    report = measure(FAMILIES["Qwen-Image"])
    assert report.calls_per_forward == MOST_SHARED
    assert report.difference > 100 * FLOAT64_BOUND


def test_the_table_in_the_docs_has_every_family() -> None:
    table = TABLE.read_text().partition("## Prompts of any length")[2]
    assert [name for name in FAMILIES if f"| {name} |" not in table] == []


def test_attention_that_takes_no_mask_gets_none() -> None:
    """Its requests share where their prompts have equally many tokens."""
    family = FAMILIES["Qwen-Image"]
    pipeline = family.build()
    alike, longer = random_requests(12, seed=0)[:2]
    requests = [alike, replace(alike, seed=7), replace(longer, text=f"{alike.text} lake")]
    # diffusers keeps it for the process as well.
    with attention_backend("native"):
        pipeline.transformer.set_attention_backend("_native_flash")
        served = serve_at_once(pipeline, family, requests, [0] * 3)
    assert max(served.levels) <= 1
    assert served.forwards < served.calls
