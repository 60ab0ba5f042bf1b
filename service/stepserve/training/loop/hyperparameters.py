"""Hyperparameters of a training stage, and what follows from them at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

# They may change between two runs of one training: how far it goes, and how often it saves.
FREE_FIELDS = ("steps", "checkpoint_interval_steps", "sample_interval_steps")


@dataclass(frozen=True)
class LoopConfig:
    """Hyperparameters of one training stage.

    Raises:
        ValueError: a count is not positive.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    final_learning_rate: float = 1e-5
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    checkpoint_interval_steps: int = 100
    sample_interval_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_interval_steps", "sample_interval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def changed(self, **values: int | None) -> LoopConfig:
        """The same with some values changed; None keeps its own."""
        given = {name: value for name, value in values.items() if value is not None}
        return replace(self, **given)


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Warm up linearly, stay, then fall by a half cosine over the last `decay_fraction`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(1, round(config.steps * config.decay_fraction))
    remaining = config.steps - step
    if remaining >= decay_steps:
        return config.learning_rate
    progress = 0.5 - 0.5 * math.cos(math.pi * remaining / decay_steps)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * progress


def ema_decay_at(step: int, config: LoopConfig) -> float:
    """The EMA forgets its random start quickly: the decay grows towards its final value."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same however often training was interrupted before."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
