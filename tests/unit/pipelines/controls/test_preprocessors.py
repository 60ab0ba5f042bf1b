"""Control images made of ordinary ones."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import Preprocessor
from stepserve.pipelines.controls import preprocessors
from stepserve.pipelines.controls.preprocessors import check_available, preprocess


def half_white() -> Image.Image:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = (200, 100, 50)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("preprocessor", list(Preprocessor))
def test_size_and_mode_are_kept(preprocessor: Preprocessor) -> None:
    if preprocessor is Preprocessor.CANNY:
        pytest.importorskip("cv2")
    made = preprocess(half_white(), preprocessor)
    assert (made.size, made.mode) == ((64, 64), "RGB")


def test_canny_shows_the_edge_and_nothing_else() -> None:
    pytest.importorskip("cv2")
    edges = np.asarray(preprocess(half_white(), "canny"))
    assert set(np.unique(edges)) == {0, 255}
    columns = np.flatnonzero(edges[..., 0].any(axis=0))
    assert 31 <= columns.min() <= columns.max() <= 32


def test_grey_invert_and_tile() -> None:
    grey = np.asarray(preprocess(half_white(), "grey"))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert grey[0, 63, 0] == 124
    inverted = np.asarray(preprocess(half_white(), "invert"))
    assert inverted[0, 0].tolist() == [255, 255, 255]
    assert inverted[0, 63].tolist() == [55, 155, 205]
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    tile = np.asarray(preprocess(Image.fromarray(noise), "tile"))
    assert tile.std() < noise.std() / 3


@pytest.mark.parametrize("preprocessor", ["", "none"])
def test_without_one_the_image_is_taken_as_given(preprocessor: str) -> None:
    assert preprocess(half_white(), preprocessor).tobytes() == half_white().tobytes()


def test_without_opencv_canny_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "cv2" else original(name, *args)

    monkeypatch.setattr(preprocessors, "find_spec", without)
    check_available("grey")
    with pytest.raises(InvalidRequestError, match=r"pip install 'stepserve\[control\]'"):
        check_available("canny")
