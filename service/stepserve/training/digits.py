"""The recipe of the embedded digits model: DDPM on pixels, from a package name to a folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stepserve.private_files import make_own_folder
from stepserve.training.data.digits import load_digits
from stepserve.training.data.labelled import LabelledImages
from stepserve.training.digits_card import digits_documents
from stepserve.training.export import export_pipeline
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.stages.pixels import BetaSchedule, PixelConfig, PixelStage

MAX_FOLDER_BYTES = 20_000_000


@dataclass(frozen=True)
class DigitsRecipe:
    """Everything that decides what the trained model becomes."""

    seed: int = 0
    pixels: PixelConfig = field(default_factory=PixelConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=6000,
            batch_size=64,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            decay_fraction=0.3,
            sample_interval_steps=250,
        )
    )

    @property
    def command(self) -> str:
        """The command line that runs this recipe."""
        steps, schedule = self.loop.steps, self.pixels.beta_schedule
        command = f"stepserve train digits --seed {self.seed} --steps {steps}"
        if schedule != PixelConfig.beta_schedule:
            command += f" --beta-schedule {schedule}"
        usual = make_recipe(self.seed, steps, beta_schedule=schedule) == self
        return command if usual else f"{command}  # and the changes to be seen in training.json"


def make_recipe(
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    beta_schedule: BetaSchedule = PixelConfig.beta_schedule,
) -> DigitsRecipe:
    """The recipe of the embedded model with some values changed; None keeps the recipe's own.

    Raises:
        ValueError: a number is not positive.
    """
    usual = DigitsRecipe()
    loop = usual.loop.changed(seed=seed, steps=steps, batch_size=batch_size)
    return DigitsRecipe(seed, replace(usual.pixels, beta_schedule=beta_schedule), loop)


def train_digits(
    recipe: DigitsRecipe, folder: Path, cache: Path, images: LabelledImages | None = None
) -> Path:
    """Train the model of digits, or continue where an earlier call stopped.

    Args:
        recipe: hyperparameters and seed.
        folder: checkpoint and sample grids; the finished model lands in `folder/model`.
        cache: the package of digits.
        images: images to learn instead of the package's. Those held out are never learned.

    Returns:
        The folder of the finished diffusers pipeline.

    Raises:
        TrainingError: see `stepserve.training.errors`.
        NotPrivateError: other users may write to one of the folders.
        KeyboardInterrupt: Ctrl-C; the same call goes on where it stopped.
    """
    for own in (folder, cache):
        make_own_folder(own)
    torch.manual_seed(recipe.seed)
    learned = (images or load_digits(cache)).training()
    pipeline = PixelStage(recipe.pixels, recipe.loop, learned, folder).train()
    documents = digits_documents(pipeline, recipe, learned)
    return export_pipeline(pipeline, documents, folder / "model", MAX_FOLDER_BYTES)
