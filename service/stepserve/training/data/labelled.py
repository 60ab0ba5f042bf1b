"""Images in classes, and which of them a training never sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class LabelledImages:
    """`pixels` (images, channels, size, size) uint8, `labels` (images,) indices of class names."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def training(self) -> LabelledImages:
        """All images but those held out."""
        return self._chosen(~self._held_out())

    def held_out(self) -> LabelledImages:
        """Every tenth image, which no training sees: for judging the result."""
        return self._chosen(self._held_out())

    def _held_out(self) -> npt.NDArray[np.bool_]:
        return np.arange(len(self)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    def _chosen(self, mask: npt.NDArray[np.bool_]) -> LabelledImages:
        return LabelledImages(self.pixels[mask], self.labels[mask], self.class_names)
