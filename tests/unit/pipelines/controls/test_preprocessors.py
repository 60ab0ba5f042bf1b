"""Control images made of ordinary ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from stepserve.cli import app
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.models import Preprocessor
from stepserve.pipelines.controls import preprocessors
from stepserve.pipelines.controls.cache import ControlCache
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.controls.preprocessors import (
    available_preprocessors,
    check_available,
    preprocess,
)
from typer.testing import CliRunner


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


@pytest.fixture
def without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "cv2" else original(name, *args)

    monkeypatch.setattr(preprocessors, "find_spec", without)


@pytest.mark.usefixtures("without_opencv")
def test_without_opencv_canny_is_refused() -> None:
    assert available_preprocessors() == ("grey", "invert", "tile")
    check_available("grey")
    with pytest.raises(InvalidRequestError, match=r"pip install 'stepserve\[control\]'"):
        check_available("canny")


@pytest.mark.usefixtures("without_opencv")
def test_an_operator_hears_of_it_when_the_configuration_is_checked(tmp_path: Path) -> None:
    edges = {"path": str(tmp_path), "preprocessor": "canny"}
    greys = {"path": str(tmp_path), "preprocessor": "grey"}
    config = {"models": {"artist": {"path": "a", "controls": {"edges": edges, "greys": greys}}}}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config | {"default_model": "artist"}))
    told = CliRunner().invoke(app, ["config", "check", "--config", str(file)])

    assert told.exit_code == 0, told.output
    [warning] = [line for line in told.stderr.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: model artist: control 'edges': its preprocessor 'canny'")


@pytest.mark.usefixtures("without_opencv")
def test_and_in_the_log_when_the_model_is_loaded(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edges = ControlSource(Path("edges"), preprocessor="canny")
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    ControlCache(pipeline, ControlOptions(named={"edges": edges}))

    assert "control 'edges': its preprocessor 'canny' needs OpenCV" in caplog.text
