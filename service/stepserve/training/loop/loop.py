"""The training loop shared by every stage: optimizers, EMA weights, checkpoints, progress.

The random numbers of a step depend on the seed and the step alone, so a run that was killed and
resumed sees the same images and the same noise as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from stepserve.training.errors import CheckpointError, TrainingDivergedError
from stepserve.training.loop.checkpoint import check_origin, load_checkpoint, save_checkpoint
from stepserve.training.loop.fingerprint import Fingerprint, describe_settings
from stepserve.training.loop.hyperparameters import (
    FREE_FIELDS,
    LoopConfig,
    ema_decay_at,
    learning_rate_at,
    step_generator,
)
from stepserve.training.loop.interrupts import StopSignals
from stepserve.training.loop.optimizer import Muon, is_matrix

LossFunction = Callable[[int, torch.Generator], torch.Tensor]
SampleFunction = Callable[[int], None]


class Trainer:
    """Runs one stage to its last step, resuming from `folder/checkpoint.pt` if that exists.

    It may be killed at any moment and loses no more than the steps since the last checkpoint;
    Ctrl-C and SIGTERM lose none.

    Args:
        modules: what is trained; its parameters stay float32.
        loss: computes the loss of a step from the step number and its generator.
        folder: where the checkpoint lives.
        on_sample: called every `sample_interval_steps` and at the end, with EMA weights in place.
        origin: what the loss depends on besides `config`: a checkpoint of another origin is
            refused.
        accumulation_steps: batches whose losses are averaged before the weights change.
    """

    def __init__(
        self,
        name: str,
        config: LoopConfig,
        modules: nn.ModuleDict,
        loss: LossFunction,
        folder: Path,
        on_sample: SampleFunction | None = None,
        origin: Fingerprint | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        self.name = name
        self.config = config
        self.modules = modules
        self.loss = loss
        self.on_sample = on_sample
        self.accumulation_steps = accumulation_steps
        self.checkpoint_path = folder / "checkpoint.pt"
        self.fingerprint = {**describe_settings("loop", config, FREE_FIELDS), **(origin or {})}
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizers = self._build_optimizers()
        self.step = 0

    def run(self) -> None:
        """Train until the last step; afterwards the modules hold the EMA weights.

        Raises:
            CheckpointError: the folder holds a checkpoint that this training cannot continue.
            TrainingDivergedError: the loss is no longer a number.
            KeyboardInterrupt: Ctrl-C, after the checkpoint was written.
            SystemExit: SIGTERM, after the checkpoint was written.
        """
        self.resume()
        if self.step < self.config.steps:
            self._train()
        self._swap_average()
        self.modules.eval()

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged, of another training, or further on than the last step.
        """
        state = load_checkpoint(self.checkpoint_path)
        if state is None:
            return
        check_origin(self.checkpoint_path, state, self.fingerprint)
        if state["step"] > self.config.steps:
            raise CheckpointError(
                f"{self.checkpoint_path} is at step {state['step']}, beyond the "
                f"{self.config.steps} asked for: ask for more, or choose another folder"
            )
        try:
            self._restore(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.checkpoint_path} is of another model: choose another folder"
            ) from error

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "fingerprint": self.fingerprint,
        }
        save_checkpoint(self.checkpoint_path, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["modules"])
        for average, stored in zip(self.average, state["average"], strict=True):
            average.copy_(stored)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step = state["step"]

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

    def _train(self) -> None:
        self.modules.train()
        progress: tqdm[NoReturn] = tqdm(
            total=self.config.steps, initial=self.step, desc=self.name, unit="step", mininterval=1
        )
        with progress as bar, StopSignals() as stop:
            while self.step < self.config.steps:
                self._advance(bar)
                if stop.received is not None:
                    self.save()
                    stop.leave()

    def _advance(self, bar: tqdm[NoReturn]) -> None:
        started_s = time.perf_counter()
        loss = self._train_step()
        images = self.config.batch_size * self.accumulation_steps
        throughput = images / (time.perf_counter() - started_s)
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
        loss = self._accumulate()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            weight = 1 - ema_decay_at(self.step, self.config)
            torch._foreach_lerp_(self.average, list[torch.Tensor](self.parameters), weight)
        self.step += 1
        return loss

    def _accumulate(self) -> float:
        """Gradients of the mean loss of this step's batches; returns the loss."""
        generator = step_generator(self.config.seed, self.step)
        total = 0.0
        for _ in range(self.accumulation_steps):
            loss = self.loss(self.step, generator) / self.accumulation_steps
            total += loss.item()
            self._check_finite(total)
            loss.backward()
        return total

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"{self.name}: the loss is {loss} at step {self.step}; lower the learning rate"
            )

    def _sample(self) -> None:
        assert self.on_sample is not None
        self._swap_average()
        self.modules.eval()
        try:
            with torch.no_grad():
                self.on_sample(self.step)
        finally:
            self.modules.train()
            self._swap_average()

    def _swap_average(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                held = parameter.clone()
                parameter.copy_(average)
                average.copy_(held)
