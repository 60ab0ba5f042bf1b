"""The training loop shared by every stage: learning rate, EMA weights, checkpoints, progress.

The random numbers of a step depend on the seed and the step alone, so a run that was killed and
resumed sees the same pictures and the same noise as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from service.training.checkpoint import load_checkpoint, save_checkpoint
from service.training.optimizer import Muon, is_matrix

LossFunction = Callable[[int, torch.Generator], torch.Tensor]
SampleFunction = Callable[[int], None]


@dataclass(frozen=True)
class LoopConfig:
    """Hyperparameters of one training stage."""

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


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Warm up linearly, stay, then decay by a half cosine over the last `decay_fraction` of steps."""
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


class Trainer:
    """Runs one stage to its last step, resuming from `folder/checkpoint.pt` if that exists.

    Args:
        modules: what is trained; its parameters stay float32.
        loss: computes the loss of a step from the step number and its generator.
        folder: where the checkpoint lives.
        on_sample: called every `sample_interval_steps` and at the end, with EMA weights in place.
    """

    def __init__(
        self,
        name: str,
        config: LoopConfig,
        modules: nn.ModuleDict,
        loss: LossFunction,
        folder: Path,
        on_sample: SampleFunction | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.modules = modules
        self.loss = loss
        self.on_sample = on_sample
        self.checkpoint_path = folder / "checkpoint.pt"
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizers = self._build_optimizers()
        self.step = 0

    def run(self) -> None:
        """Train until the last step; afterwards the modules hold the EMA weights."""
        self.resume()
        self.modules.train()
        with tqdm(
            total=self.config.steps, initial=self.step, desc=self.name, unit="step", mininterval=1
        ) as bar:
            try:
                while self.step < self.config.steps:
                    self._advance(bar)
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()
        self._swap_average()
        self.modules.eval()

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        state = load_checkpoint(self.checkpoint_path)
        if state is None:
            return
        self.modules.load_state_dict(state["modules"])
        for average, stored in zip(self.average, state["average"], strict=True):
            average.copy_(stored)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        save_checkpoint(self.checkpoint_path, state)

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        named = [(n, p) for n, p in self.modules.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if is_matrix(n, p)]
        others = [p for n, p in named if not is_matrix(n, p)]
        rate = config.learning_rate
        return [
            Muon(matrices, lr=rate, weight_decay=config.weight_decay),
            torch.optim.AdamW(
                others,
                lr=rate,
                betas=(0.9, config.beta2),
                weight_decay=config.weight_decay,
                fused=True,
            ),
        ]

    def _advance(self, bar: tqdm[None]) -> None:
        started_s = time.perf_counter()
        loss = self._train_step()
        throughput = self.config.batch_size / (time.perf_counter() - started_s)
        bar.set_postfix(loss=f"{loss:.4f}", samples_per_s=f"{throughput:.0f}", refresh=False)
        bar.update()
        last = self.step == self.config.steps
        if last or self.step % self.config.checkpoint_interval_steps == 0:
            self.save()
        if self.on_sample and (last or self.step % self.config.sample_interval_steps == 0):
            self._sample()

    def _train_step(self) -> float:
        rate = learning_rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.step, step_generator(self.config.seed, self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            weight = 1 - ema_decay_at(self.step, self.config)
            torch._foreach_lerp_(self.average, self.parameters, weight)
        self.step += 1
        return loss.item()

    def _sample(self) -> None:
        assert self.on_sample is not None
        self._swap_average()
        self.modules.eval()
        with torch.no_grad():
            self.on_sample(self.step)
        self.modules.train()
        self._swap_average()

    def _swap_average(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                held = parameter.clone()
                parameter.copy_(average)
                average.copy_(held)
