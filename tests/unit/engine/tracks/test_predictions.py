"""What a step cache makes of the calls of pipelines as they are: outputs, rows, phases, methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from predictable_network import RUN, STEPS, ListNetwork, Network, at, noisy, sample, serve
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.tracks.step_cache import CachedPhase
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda out: out, lambda out: out),
        (lambda out: (out,), lambda out: out[0]),
        (lambda out: {"sample": out}, lambda out: out["sample"]),
        (lambda out: UNet2DConditionOutput(sample=out), lambda out: out.sample),
        (lambda out: [out, None, "text", torch.tensor(3)], lambda out: out[0]),
    ],
)
def test_an_output_of_any_form_is_predicted_in_that_form(
    wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]
) -> None:
    module = Network(wrap)
    outputs = serve(
        module,
        lambda: [module(noisy(step), torch.tensor(at(step))) for step in range(STEPS)],
        CachedPhase(STEPS),
    )
    assert module.seen == [at(step) for step in RUN]
    assert {type(output) for output in outputs} == {type(wrap(sample()))}
    for step, output in enumerate(outputs):
        assert unwrap(output).unique().item() == pytest.approx(at(step) / 4)
    if isinstance(outputs[4], list):
        assert outputs[4][1:3] == [None, "text"]
        assert outputs[4][3].item() == 3


def test_lists_with_one_tensor_a_row_are_predicted_row_by_row() -> None:
    module = ListNetwork()

    def run() -> list[Any]:
        return [module(list(noisy(step)), torch.full((2,), at(step))) for step in range(STEPS)]

    rules = ArgumentRules(row_lists=frozenset({"x"}))
    outputs = serve(module, run, CachedPhase(STEPS), rules=rules)
    assert module.seen == [at(step) for step in RUN]
    assert [len(rows) for rows, _ in outputs] == [2] * STEPS
    assert [rows[1][0].item() for rows, _ in outputs] == pytest.approx(
        [at(s) / 4 for s in range(8)]
    )
    # What is no number is that of the last call that ran.
    assert [kept["kept"] for _, kept in outputs] == [1, 2, 3, 3, 3, 3, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_prediction_has_dtype_and_memory_format_of_the_output(dtype: torch.dtype) -> None:
    module = Network(
        lambda out: out.reshape(2, 2, 3, 1).contiguous(memory_format=torch.channels_last)
    )
    outputs = serve(
        module,
        lambda: [module(noisy(s).to(dtype), torch.tensor(at(s))) for s in range(STEPS)],
        CachedPhase(STEPS),
    )
    assert {output.dtype for output in outputs} == {dtype}
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)
    # Multiples of 25 up to 225 are exact in half precision, and so is the line through them.
    assert [out.max().item() for out in outputs] == [at(step) / 4 for step in range(STEPS)]


def test_a_pipeline_may_write_into_what_it_gets() -> None:
    module = Network()

    def run() -> list[float]:
        found = []
        for step in range(STEPS):
            given = noisy(step)
            output = module(given, torch.tensor(at(step)))[0]
            found.append(output.max().item())
            output.fill_(7.0)
            given.fill_(9.0)
        return found

    assert serve(module, run, CachedPhase(STEPS)) == [at(step) / 4 for step in range(STEPS)]


def test_calls_without_a_timestep_go_by_their_number() -> None:
    class Counting(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample * 2

    module = Counting()
    outputs = serve(
        module, lambda: [module(noisy(step)) for step in range(STEPS)], CachedPhase(STEPS)
    )
    assert [out.max().item() for out in outputs] == [4.0 * (1 + step) for step in range(STEPS)]


def test_inputs_may_be_numbers_of_tokens() -> None:
    module = Network()

    def run() -> list[float]:
        tokens = [torch.arange(6).reshape(2, 3) + step for step in range(STEPS)]
        outputs = [
            module(ids, torch.tensor(at(step)), text=torch.zeros(2, 1))[0].double()
            for step, ids in enumerate(tokens)
        ]
        return [output.max().item() for output in outputs]

    module.wrap = lambda out: (out.float(),)
    assert serve(module, run, CachedPhase(STEPS)) == [at(step) // 4 for step in range(STEPS)]
    assert module.seen == [at(step) for step in RUN]


def test_a_call_that_is_given_nothing_to_denoise_runs() -> None:
    class Constant(nn.Module):
        calls = 0

        def forward(self, timestep: Tensor) -> Tensor:
            self.calls += 1
            return timestep.reshape(1, 1) * 2

    module = Constant()
    serve(module, lambda: [module(torch.tensor(at(s))) for s in range(STEPS)], CachedPhase(STEPS))
    assert module.calls == STEPS


def test_at_one_timestep_twice_the_last_output_is_repeated() -> None:
    """As PNDM is at its second and third call."""
    module, times = Network(), [900.0, 800.0, 800.0, 700.0, 600.0]
    outputs = serve(
        module,
        lambda: [module(noisy(s), torch.tensor(t))[0] for s, t in enumerate(times)],
        CachedPhase(5),
    )
    assert module.seen == [900.0, 800.0, 800.0, 600.0]
    assert [out.max().item() for out in outputs] == [225.0, 200.0, 200.0, 200.0, 150.0]


def test_an_output_that_cannot_be_looked_into_is_never_predicted() -> None:
    @dataclass
    class Opaque:
        __slots__ = ("value",)
        value: Tensor

    module = Network(Opaque)
    outputs = serve(
        module,
        lambda: [module(noisy(step), torch.tensor(at(step))) for step in range(STEPS)],
        CachedPhase(STEPS),
    )
    assert len(module.seen) == len(outputs) == STEPS


def test_an_output_that_changes_its_form_is_predicted_once_two_are_alike() -> None:
    """As with Qwen-Image 2.1, which fills its cache with the prompt's tokens at its first call."""
    module = Network()
    module.wrap = lambda out: torch.cat([out, out]) if len(module.seen) < 3 else out
    outputs = serve(
        module,
        lambda: [module(noisy(step), torch.tensor(at(step))) for step in range(STEPS)],
        CachedPhase(STEPS),
    )
    assert module.seen == [at(step) for step in (0, 1, 2, 3, 7)]
    assert [len(out) for out in outputs] == [4, 4, *[2] * 6]


def test_numbers_that_are_none_are_not_skipped_on() -> None:
    module = Network()

    def run() -> Sequence[Tensor]:
        return [
            module(noisy(step) * (float("nan") if step > 4 else 1.0), torch.tensor(at(step)))[0]
            for step in range(STEPS)
        ]

    outputs = serve(module, run, CachedPhase(STEPS))
    assert module.seen == [at(step) for step in (0, 1, 2, 5, 6, 7)]
    assert torch.isfinite(outputs[4]).all()
