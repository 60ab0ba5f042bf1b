"""What a folder of training images holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SHOWN_PROBLEMS = 20


class Labelling(StrEnum):
    """Where the labels of the images come from."""

    CLASSES = "class-folders"
    FILE_NAMES = "file-names"
    SIDECARS = "text-files"
    TABLES = "caption-files"
    NONE = "none"


class Outcome(StrEnum):
    """What becomes of a file with a problem."""

    SKIPPED = "skipped"
    CONVERTED = "converted"
    NOTED = "noted"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file, whose name is relative to the folder."""

    file: str
    outcome: Outcome
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.outcome}: {self.message}"


@dataclass(frozen=True)
class ProblemReport:
    """All problems of a folder, in the order of its files."""

    problems: tuple[Problem, ...]

    @property
    def skipped(self) -> tuple[Problem, ...]:
        """Those that cost an image, a caption or another file."""
        return tuple(each for each in self.problems if each.outcome == Outcome.SKIPPED)

    def lines(self, limit: int = SHOWN_PROBLEMS) -> list[str]:
        """A line for each of the first `limit` problems, what costs files first; then a count."""
        order = list(Outcome)
        ranked = sorted(self.problems, key=lambda each: order.index(each.outcome))
        shown = [str(each) for each in ranked[:limit]]
        left = Counter(each.outcome for each in ranked[limit:])
        return shown + [f"and {count} more {outcome}" for outcome, count in left.items()]


@dataclass(frozen=True)
class TrainingImage:
    """An image that was decoded once and can be used.

    `name` is relative to the folder, with forward slashes. `label` is an index of the class names.
    `pixels_digest` is the same for images of the same upright RGB pixels.
    """

    name: str
    width_px: int
    height_px: int
    pixels_digest: str
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class FolderDataset:
    """The images of a folder that can be used, in the order of their names."""

    folder: Path
    images: tuple[TrainingImage, ...]
    labelling: Labelling
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def path(self, image: TrainingImage) -> Path:
        """Where an image lies."""
        return self.folder / image.name

    def summary(self) -> list[str]:
        """What was found, a line for each kind of thing."""
        widths = [image.width_px for image in self.images]
        heights = [image.height_px for image in self.images]
        return [
            f"{len(self)} images, {min(widths)} to {max(widths)} px wide, "
            f"{min(heights)} to {max(heights)} px high",
            *self._label_lines(),
        ]

    def _label_lines(self) -> list[str]:
        if self.labelling == Labelling.CLASSES:
            counts = Counter(image.label for image in self.images)
            names = enumerate(self.class_names)
            listed = ", ".join(f"{name} ({counts[label]})" for label, name in names)
            return [f"{len(self.class_names)} classes: {listed}"]
        if self.labelling == Labelling.NONE:
            return ["no labels"]
        captions = [image.caption for image in self.images if image.caption is not None]
        different = len(set(captions))
        return [f"{len(captions)} captions from {self.labelling}, {different} of them different"]
