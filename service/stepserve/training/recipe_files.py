"""Recipes: what decides a training, as YAML files outside and frozen dataclasses inside."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from stepserve.training.data.folders.dataset import Labelling
from stepserve.training.diffusion import Prediction
from stepserve.training.errors import RecipeError
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.stages.folder_pixels import Augmentation, Objective
from stepserve.training.stages.pixels import PixelConfig

USUAL = Path(__file__).parent / "recipes" / "pixel.yaml"


@dataclass(frozen=True)
class FolderRecipe:
    """A denoiser of pixels, trained on a folder of images.

    `labels` says where their labels come from; None: what the folder has.

    Raises:
        ValueError: values do not fit one another.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    kind: Literal["pixel"] = "pixel"
    labels: Labelling | None = None
    model: PixelConfig = field(default_factory=PixelConfig)
    objective: Objective = field(default_factory=Objective)
    augmentation: Augmentation = field(default_factory=Augmentation)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=10_000, batch_size=32, learning_rate=1e-3)
    )

    def __post_init__(self) -> None:
        halved = 2 ** (len(self.model.block_channels) - 1)
        if self.model.size_px % halved:
            raise ValueError(f"size_px {self.model.size_px} is not a multiple of {halved}")
        if self.model.channels != 3:
            raise ValueError(f"channels must be 3, not {self.model.channels}")
        if self.objective.zero_terminal_snr and self.model.prediction == Prediction.EPSILON:
            raise ValueError(
                "zero_terminal_snr needs prediction v_prediction or sample: "
                "where there is noise alone, the noise does not tell the image"
            )

    def changed(
        self,
        *,
        labels: Labelling | None = None,
        size_px: int | None = None,
        **loop: int | None,
    ) -> FolderRecipe:
        """The recipe with some values changed; None keeps its own.

        Raises:
            RecipeError: the values do not fit.
        """
        try:
            return replace(
                self,
                labels=labels or self.labels,
                model=replace(self.model, size_px=size_px or self.model.size_px),
                loop=self.loop.changed(**loop),
            )
        except ValueError as error:
            raise RecipeError(str(error)) from error


def load_recipe(path: Path = USUAL) -> FolderRecipe:
    """Read a recipe file.

    Raises:
        RecipeError: names the file, each wrong field and what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(FolderRecipe).validate_python(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        wrong = [f"{_place(each['loc'])}: {each['msg']}" for each in error.errors()]
        raise RecipeError(f"{path}: {'; '.join(wrong)}") from error


def recipe_text(recipe: FolderRecipe) -> str:
    """A recipe file that reads as `recipe`."""
    plain = TypeAdapter(FolderRecipe).dump_python(recipe, mode="json")
    return yaml.safe_dump(plain, sort_keys=False)


def _place(parts: tuple[int | str, ...]) -> str:
    return ".".join(map(str, parts)) or "recipe"
