"""The pixels of a dataset as one array, decoded and scaled before a training starts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from stepserve.training.data.folders.dataset import FolderDataset
from stepserve.training.data.folders.image_files import decode


def load_pixels(dataset: FolderDataset, side_px: int) -> npt.NDArray[np.uint8]:
    """Squares from the middles of all images, (images, 3, side_px, side_px).

    Raises:
        UnusableImageError: a file has changed since it was checked.
    """
    pixels = np.empty((len(dataset), 3, side_px, side_px), np.uint8)
    for row, image in zip(pixels, dataset.images, strict=True):
        upright = decode(dataset.path(image)).image
        square = ImageOps.fit(upright, (side_px, side_px), Image.Resampling.LANCZOS)
        row[:] = np.asarray(square).transpose(2, 0, 1)
    return pixels
