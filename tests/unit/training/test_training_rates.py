"""Learning rates, EMA decay, and the random numbers of a step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from stepserve.training.loop.hyperparameters import (
    LoopConfig,
    ema_decay_at,
    learning_rate_at,
    step_generator,
)

CONFIG = LoopConfig(
    steps=1000,
    batch_size=8,
    learning_rate=1.0,
    final_learning_rate=0.1,
    warmup_steps=100,
    decay_fraction=0.25,
    ema_decay=0.99,
)


def test_rate_warms_up_stays_and_decays() -> None:
    rates = [learning_rate_at(step, CONFIG) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == 1.0
    assert set(rates[100:750]) == {1.0}
    assert rates[875] == pytest.approx(0.55)
    assert rates[999] == pytest.approx(0.1, abs=1e-3)
    assert all(earlier >= later for earlier, later in pairwise(rates[100:]))


def test_ema_decay_grows_to_its_final_value() -> None:
    decays = [ema_decay_at(step, CONFIG) for step in range(2000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_random_numbers_depend_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> list[float]:
        numbers: list[float] = torch.rand(4, generator=step_generator(seed, step)).tolist()
        return numbers

    assert draw(0, 5) == draw(0, 5)
    assert draw(0, 5) != draw(0, 6)
    assert draw(0, 5) != draw(1, 5)


@pytest.mark.parametrize("field", ["steps", "batch_size", "checkpoint_interval_steps"])
def test_counts_must_be_positive(field: str) -> None:
    values = {"steps": 1, "batch_size": 1, "learning_rate": 1.0, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        LoopConfig(**values)  # type: ignore[arg-type]
