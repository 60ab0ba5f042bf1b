"""From a folder of images and a recipe to a model that can be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from stepserve.private_files import make_own_folder
from stepserve.training.data.folders.dataset import FolderDataset, Labelling, ProblemReport
from stepserve.training.data.folders.pixels import load_pixels
from stepserve.training.data.folders.reading import read_folder
from stepserve.training.data.labelled import LabelledImages
from stepserve.training.export import export_pipeline
from stepserve.training.folder_card import folder_documents
from stepserve.training.loop.files import write_atomically
from stepserve.training.recipe_files import FolderRecipe, recipe_text
from stepserve.training.stages.folder_pixels import FolderStage

MAX_FOLDER_BYTES = 8_000_000_000


def check_folder(
    recipe: FolderRecipe, folder: Path, on_file: Callable[[str], None] | None = None
) -> tuple[FolderDataset, ProblemReport]:
    """All that the training will take from the folder, and what is wrong with the rest.

    Raises:
        DatasetError: it cannot be trained on.
    """
    return read_folder(folder, recipe.model.size_px, recipe.labels, on_file)


def train_folder(recipe: FolderRecipe, dataset: FolderDataset, output: Path) -> Path:
    """Train a model of the images, or continue where an earlier call stopped.

    Args:
        output: recipe, checkpoint and sample grids; the finished model lands in `output/model`.

    Returns:
        The folder of the finished diffusers pipeline.

    Raises:
        TrainingError: see `stepserve.training.errors`.
        NotPrivateError: other users may write to `output`.
        KeyboardInterrupt: Ctrl-C; the same call goes on where it stopped.
    """
    make_own_folder(output)
    write_atomically(output / "recipe.yaml", recipe_text(recipe).encode())
    pipeline = make_stage(recipe, dataset, output).train()
    documents = folder_documents(pipeline, recipe, dataset)
    return export_pipeline(pipeline, documents, output / "model", MAX_FOLDER_BYTES)


def make_stage(recipe: FolderRecipe, dataset: FolderDataset, output: Path) -> FolderStage:
    """What is trained, untrained yet; the seed decides its first weights."""
    pixels = load_pixels(dataset, recipe.model.size_px + recipe.augmentation.crop_margin_px)
    has_classes = dataset.labelling == Labelling.CLASSES
    labels = np.array([image.label or 0 for image in dataset.images], np.int64)
    images = LabelledImages(pixels, labels, dataset.class_names if has_classes else ())
    torch.manual_seed(recipe.loop.seed)
    return FolderStage(
        recipe.model, recipe.objective, recipe.augmentation, recipe.loop, images, output
    )
