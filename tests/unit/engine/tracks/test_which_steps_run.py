"""Which calls a step cache lets run: phases, rows, methods, controls, and guiders of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from engine_fakes import Bench, Ear, make_parkable, make_track
from predictable_network import ALWAYS, RUN, STEPS, Network, at, noisy, serve
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from torch import Tensor


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
