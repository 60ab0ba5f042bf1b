"""What can go wrong in training, in words for the person at the command line.

TrainingError
├── PackageUnavailableError      a package with images cannot be fetched or read
├── DatasetError                 a folder of images cannot be trained on
├── RecipeError                  a recipe has unknown fields, or values that do not fit
├── StartingModelError           the model to train further is absent, or of other shapes
├── CheckpointError              a checkpoint is damaged, or belongs to another training
├── TrainingDivergedError        the loss is no longer a number
├── ExportError                  the finished model breaks a promise, such as its size
└── ModelNotExplainableError     the strips can be drawn for velocity predictors only
"""

from __future__ import annotations

from stepserve.domain.errors import StepserveError


class TrainingError(StepserveError):
    """Root of everything the training room raises on purpose."""


class PackageUnavailableError(TrainingError):
    """A package with images could not be fetched; the message says what to install or check."""


class DatasetError(TrainingError):
    """A folder of images cannot be trained on; the message names each file and what is wrong."""


class RecipeError(TrainingError):
    """A recipe has unknown fields, wrong values, or values that do not fit one another."""


class StartingModelError(TrainingError):
    """There is no model to go on from in the folder that was named, or it does not fit."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be continued; the message names the file and the way out."""


class TrainingDivergedError(TrainingError):
    """The loss is infinite or not a number; the last checkpoint is from before that."""


class ExportError(TrainingError):
    """The trained pipeline is not what is promised to those who load it."""


class ModelNotExplainableError(TrainingError):
    """There is no model in a folder, or it is of another kind than the strips are made for."""
