"""What a step cache makes of the calls of pipelines as they are: outputs, rows, phases, methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from engine_fakes import Bench, Ear, make_parkable, make_track
from stepserve.domain.step_cache import StepCacheUse
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from torch import Tensor, nn

ALWAYS = StepCacheUse(threshold=1e9)
STEPS = 8
# Of 8 steps: the first three and the last one.
RUN = [0, 1, 2, 7]


class Network(nn.Module):
    """Its output is a straight line in the timestep, so that a prediction is exact."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda output: (output,)) -> None:
        super().__init__()
        self.wrap = wrap
        self.seen: list[float] = []

    def forward(self, sample: Tensor, timestep: Any, *, text: Tensor | None = None) -> Any:
        at = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)
        self.seen.append(at.max().item())
        shift = 0.0 if text is None else text[:, :1].to(sample.dtype)
        return self.wrap(sample * 0 + at.max().to(sample.dtype) * 0.25 + shift)


class ListNetwork(Network):
    """Takes and gives lists with one tensor a row, as Z-Image does."""

    def forward(self, x: list[Tensor], t: Tensor) -> Any:  # type: ignore[override]
        self.seen.append(t.max().item())
        return [row * 0 + t.max() * 0.25 for row in x], {"kept": len(self.seen)}


def serve(
    module: nn.Module,
    run: Callable[[], Any],
    *phases: CachedPhase,
    rules: ArgumentRules | None = None,
    stage: str = "denoise",
    use: StepCacheUse = ALWAYS,
    **changes: Any,
) -> Any:
    """What a request gets whose calls of a module are skipped wherever they may be."""
    options = {} if rules is None else {"rules": rules}
    undo = make_parkable(module, "module", "forward", stage=stage, **options)
    bench = Bench()
    track = make_track(run, steps=sum(phase.calls for phase in phases))
    ear = bench.add_track(replace(track, step_cache=StepCache(use, phases), **changes))
    bench.run()
    undo()
    assert ear.ends == ["finished"], ear.error
    return ear.result


def sample(rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(1, 2, rows * 6, dtype=torch.float64).reshape(rows, 6).to(dtype)


def noisy(step: int, rows: int = 2) -> Tensor:
    """Inputs that change, as else nothing is known of how outputs follow them."""
    return sample(rows) * (1 + step)


def at(step: int) -> float:
    return float(900 - 100 * step)


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


def test_each_phase_begins_anew() -> None:
    module = Network()

    def run() -> list[float]:
        sizes = [(step, rows) for rows in (2, 1) for step in range(STEPS)]
        return [
            module(noisy(step, rows), torch.tensor(at(step) + rows))[0].max().item()
            for step, rows in sizes
        ]

    found = serve(module, run, CachedPhase(STEPS), CachedPhase(STEPS))
    assert module.seen == [at(step) + rows for rows in (2, 1) for step in RUN]
    assert found == [(at(step) + rows) / 4 for rows in (2, 1) for step in range(STEPS)]


def test_what_comes_after_the_expected_calls_runs() -> None:
    module = Network()

    def run() -> None:
        for step in range(STEPS + 3):
            module(noisy(step), torch.tensor(at(step)))

    serve(module, run, CachedPhase(STEPS))
    assert module.seen == [at(step) for step in [*RUN, 8, 9, 10]]


def test_another_number_of_rows_begins_a_new_history() -> None:
    """As a guidance interval does, in the middle of an image."""
    module = Network()
    steps = 14

    def run() -> list[Tensor]:
        return [module(noisy(step), torch.tensor(at(step)))[0] for step in range(steps)]

    interval = GuidanceInterval(2, steps, lambda call: call < 6)
    outputs = serve(module, run, CachedPhase(steps), guidance_interval=interval)
    assert module.seen == [at(step) for step in (0, 1, 2, 6, 7, 8, 13)]
    assert [out.max().item() for out in outputs] == [at(step) / 4 for step in range(steps)]
    assert {out.shape for out in outputs} == {(2, 6)}


def test_another_method_begins_a_new_history() -> None:
    """As Wan 2.2 has one transformer for the noisy steps and one for the others."""
    first, second = Network(), Network()
    undo = make_parkable(second, "second", "forward", stage="denoise")

    def run() -> None:
        for step in range(16):
            (first if step < 8 else second)(noisy(step), torch.tensor(at(step)))

    serve(first, run, CachedPhase(16))
    undo()
    assert first.seen == [at(step) for step in (0, 1, 2)]
    assert second.seen == [at(step) for step in (8, 9, 10, 15)]


def test_a_control_that_is_called_once_is_in_nobodys_way() -> None:
    """As T2I-Adapters are, before the first step and with another input."""
    adapter, denoiser = Network(), Network()
    undo = make_parkable(denoiser, "unet", "forward", stage="denoise")

    def run() -> None:
        adapter(torch.ones(2, 3, 5), 0.0)
        for step in range(STEPS):
            denoiser(noisy(step), torch.tensor(at(step)))

    serve(adapter, run, CachedPhase(STEPS), stage="control")
    undo()
    assert adapter.seen == [0.0]
    assert denoiser.seen == [at(step) for step in RUN]


def test_two_controls_are_skipped_with_the_denoiser() -> None:
    """One of them twice at each step, with two images."""
    controls, denoiser = [Network(), Network()], Network()
    undo = [
        make_parkable(module, name, "forward", stage=stage)
        for module, name, stage in (
            (controls[1], "other", "control"),
            (denoiser, "unet", "denoise"),
        )
    ]

    def run() -> list[float]:
        found = []
        for step in range(STEPS):
            given, timestep = noisy(step), torch.tensor(at(step))
            residuals = [
                controls[which](given, timestep, text=torch.full((2, 1), float(shift)))[0]
                for which, shift in ((0, 1), (0, 2), (1, 3))
            ]
            found.append(sum(residuals).max().item())
            denoiser(given, timestep)
        return found

    found = serve(controls[0], run, CachedPhase(STEPS), stage="control")
    for each in undo:
        each()
    assert controls[0].seen == [at(step) for step in RUN for _ in range(2)]
    assert controls[1].seen == denoiser.seen == [at(step) for step in RUN]
    # Each its own last one.
    assert found == [3 * at(step) / 4 + 6 for step in (0, 1, 2, 2, 2, 2, 2, 7)]


def test_nothing_is_skipped_where_steps_have_more_calls_than_was_expected() -> None:
    """As with a guider that predicts a third time at some steps."""
    module, numbers = Network(), [2, 3, *[2] * 12]

    def run() -> list[float]:
        return [
            module(noisy(step), torch.tensor(at(step)), text=torch.full((2, 1), float(number)))[0]
            .max()
            .item()
            for step, calls in enumerate(numbers)
            for number in range(calls)
        ]

    found = serve(module, run, CachedPhase(28, calls_per_step=2))
    assert len(module.seen) == sum(numbers)
    assert found[-1] == at(13) / 4 + 1


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


def test_requests_that_share_no_forward_skip_as_others() -> None:
    module = Network()
    undo = make_parkable(module, "module", "forward", stage="denoise")
    bench = Bench()

    def run() -> list[float]:
        return [
            module(noisy(step), torch.tensor(at(step)))[0].max().item() for step in range(STEPS)
        ]

    ears: list[Ear] = []
    for name in "ab":
        cache = StepCache(ALWAYS, [CachedPhase(STEPS)])
        track = replace(make_track(run, name=name, steps=STEPS), isolated=True, step_cache=cache)
        ears.append(bench.add_track(track))
    bench.run()
    undo()
    assert [ear.result for ear in ears] == [[at(step) / 4 for step in range(STEPS)]] * 2
    assert bench.batcher.counters.forwards == 2 * len(RUN)
