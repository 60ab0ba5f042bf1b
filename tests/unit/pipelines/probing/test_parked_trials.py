"""Trials stop at the calls that are wanted of them, and end whatever becomes of these."""

from __future__ import annotations

import pytest
import torch
from stepserve.engine.tracks.track import Stage
from stepserve.pipelines.modules.parking import ParkingOptions
from stepserve.pipelines.probing.parked_calls import parked_at
from torch import Tensor, nn

STEPS = 3


class Scale(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample * 2


class TwoStages:
    """Two modules that step, one after the other, and a decoder."""

    def __init__(self) -> None:
        self.components = {"prior": Scale(), "unet": Scale(), "text_encoder": Scale()}
        self.ended = 0

    def __call__(self) -> Tensor:
        sample = self.components["text_encoder"](torch.ones(1, 2))
        try:
            for name in ("prior", "unet"):
                for _ in range(STEPS):
                    sample = self.components[name](sample)
        finally:
            self.ended += 1
        return sample


def test_the_first_call_of_every_module_that_steps_is_seen() -> None:
    pipeline = TwoStages()
    with parked_at(Stage.DENOISE, pipeline, [pipeline, pipeline], ParkingOptions()) as groups:
        seen = {
            group[0].method.name: [float(call.args[0][0, 0]) for call in group] for group in groups
        }
        assert pipeline.ended == 0
    assert seen == {"prior.forward": [2.0, 2.0], "unet.forward": [16.0, 16.0]}
    assert pipeline.ended == 2
    # Nothing parks any more.
    assert float(pipeline()[0, 0]) == 2 ** (1 + 2 * STEPS)


def test_what_runs_inside_calls_is_not_waited_for() -> None:
    pipeline = TwoStages()
    options = ParkingOptions(inline=frozenset({"unet"}))
    with parked_at(Stage.DENOISE, pipeline, [pipeline], options) as groups:
        assert [[call.method.name for call in group] for group in groups] == [["prior.forward"]]


def test_trials_end_although_the_block_raises() -> None:
    pipeline = TwoStages()
    with (
        pytest.raises(ZeroDivisionError),
        parked_at(Stage.DENOISE, pipeline, [pipeline], ParkingOptions()),
    ):
        raise ZeroDivisionError
    assert pipeline.ended == 1
