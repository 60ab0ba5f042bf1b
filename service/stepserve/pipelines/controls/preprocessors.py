"""Makes control images of ordinary ones, where that takes no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import Preprocessor

# Gradients over the second begin an edge, and those over the first go on with it: the values that
# the usual networks were trained with.
CANNY_THRESHOLDS = 100, 200
TILE_SHARE = 8
"""Details smaller than so many pixels are left out."""


def available_preprocessors() -> tuple[str, ...]:
    """Those for which everything is installed."""
    return tuple(one for one in Preprocessor if _is_available(one))


def _is_available(preprocessor: str) -> bool:
    return preprocessor != Preprocessor.CANNY or find_spec("cv2") is not None


def missing_preprocessors(usual: Mapping[str, str]) -> Iterator[str]:
    """Why the requests of some controls will be refused that name no preprocessor.

    Args:
        usual: the preprocessors of such requests, by the names of the controls.
    """
    for name, preprocessor in usual.items():
        if not _is_available(preprocessor):
            yield (
                f"control {name!r}: its preprocessor {preprocessor!r} needs OpenCV, which is not "
                "installed (pip install 'stepserve[control]'): requests that name no other will be "
                "refused"
            )


def check_available(preprocessor: str) -> None:
    """Return if what a preprocessor needs is installed.

    Raises:
        InvalidRequestError: says what to install.
    """
    if not _is_available(preprocessor):
        raise InvalidRequestError(
            "controls: preprocessor 'canny' needs OpenCV, which this server lacks: its operator "
            "can install it with `pip install 'stepserve[control]'`; or send the edges as the "
            "image, with preprocessor 'none'",
            "controls",
        )


def preprocess(image: Image.Image, preprocessor: str) -> Image.Image:
    """The control image of an RGB image, in RGB and of its size.

    Args:
        image: what to make it of.
        preprocessor: one of `Preprocessor`; empty leaves the image as it is.
    """
    match preprocessor:
        case Preprocessor.CANNY:
            return _edges(image)
        case Preprocessor.GREY:
            return image.convert("L").convert("RGB")
        case Preprocessor.INVERT:
            return ImageOps.invert(image)
        case Preprocessor.TILE:
            return _without_details(image)
        case _:
            return image


def _edges(image: Image.Image) -> Image.Image:
    # An extra that need not be installed.
    import cv2

    edges: Any = cv2.Canny(np.asarray(image.convert("L")), *CANNY_THRESHOLDS)
    return Image.fromarray(edges).convert("RGB")


def _without_details(image: Image.Image) -> Image.Image:
    small = tuple(max(side // TILE_SHARE, 1) for side in image.size)
    reduced = image.resize((small[0], small[1]), Image.Resampling.BOX)
    return reduced.resize(image.size, Image.Resampling.BICUBIC)
