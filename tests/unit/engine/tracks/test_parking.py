from __future__ import annotations

import inspect

import torch
from engine_fakes import Bench, make_parkable, make_track


class Doubler(torch.nn.Module):
    def forward(self, sample: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
        return sample * scale


def test_outside_a_track_nothing_changes() -> None:
    module = Doubler()
    make_parkable(module, "doubler", "forward", stage="denoise")
    assert module(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]
    assert list(inspect.signature(module.forward).parameters) == ["sample", "scale"]


def test_undoing_restores_the_module() -> None:
    module = Doubler()
    undo = make_parkable(module, "doubler", "forward", stage="denoise")
    undo()
    assert "forward" not in vars(module)
    undo()
    assert module(torch.ones(1)).item() == 2


def test_undoing_keeps_what_was_on_the_instance_before() -> None:
    """Such as the hooks that accelerate puts there."""
    module = Doubler()
    hook = lambda sample: sample + 5  # noqa: E731
    module.forward = hook  # type: ignore[assignment]
    make_parkable(module, "doubler", "forward", stage="denoise")()
    assert module.forward is hook


def test_two_engines_may_share_a_module() -> None:
    module = Doubler()
    first = make_parkable(module, "doubler", "forward", stage="denoise")
    second = make_parkable(module, "doubler", "forward", stage="denoise")
    first()
    bench = Bench()
    ears = [bench.add_track(make_track(lambda: module(torch.ones(1, 2)))) for _ in range(3)]
    bench.run()
    assert [ear.result.tolist() for ear in ears] == [[[2.0, 2.0]]] * 3
    assert bench.batcher.counters.forwards == 1
    second()
    assert module(torch.ones(1)).item() == 2


def test_arguments_that_cannot_be_read_fail_their_own_request_only() -> None:
    bench = Bench()
    module = Doubler()
    make_parkable(module, "doubler", "forward", stage="denoise")
    endless: list[object] = []
    endless.append(endless)
    odd = bench.add_track(make_track(lambda: module(torch.ones(1, 2), scale=endless), name="odd"))
    fine = bench.add_track(make_track(lambda: module(torch.ones(1, 2)), name="fine"))
    bench.run()
    assert isinstance(odd.error, RecursionError)
    assert fine.ends == ["finished"]
