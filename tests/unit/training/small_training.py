"""A training of milliseconds a step, run by the tests here and, to be killed, as a program."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.loop.loop import SampleFunction, Trainer
from torch import nn

STEPS = 400


def build_modules() -> nn.ModuleDict:
    torch.manual_seed(0)
    kernel = nn.Conv2d(4, 8, 3, padding=1)
    kernel.weight.data = kernel.weight.data.contiguous(memory_format=torch.channels_last)
    return nn.ModuleDict({"kernel": kernel, "norm": nn.GroupNorm(2, 8), "hidden": nn.Linear(8, 16)})


def build_trainer(
    folder: Path,
    steps: int = STEPS,
    checkpoint_interval_steps: int = STEPS,
    learning_rate: float = 1e-2,
    on_sample: SampleFunction | None = None,
) -> Trainer:
    modules = build_modules()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(4, 4, 6, 6, generator=generator)
        hidden = modules["norm"](modules["kernel"](x)).mean(dim=(2, 3))
        result: torch.Tensor = ((modules["hidden"](hidden) - x.mean()) ** 2).mean()
        return result

    config = LoopConfig(
        steps=steps,
        batch_size=4,
        learning_rate=learning_rate,
        warmup_steps=5,
        checkpoint_interval_steps=checkpoint_interval_steps,
        sample_interval_steps=10,
    )
    return Trainer("small", config, modules, loss, folder, on_sample)


def final_weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.modules.parameters()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A line every ten steps, for whoever waits to kill it.
    build_trainer(
        Path(sys.argv[1]),
        checkpoint_interval_steps=1,
        on_sample=lambda step: print(step, flush=True),
    ).run()
