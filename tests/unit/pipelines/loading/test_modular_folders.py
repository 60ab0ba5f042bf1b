"""Modular pipelines are refused with their class and the reason; nothing of them is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import ModularPipeline, StableDiffusionXLAutoBlocks
from stepserve.models.catalogue import ModelNotFoundError, model_folder
from stepserve.models.modular import MODULAR_INDEX
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As diffusers writes it."""
    pipeline: ModularPipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    pipeline.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    assert (tmp_path / "modular" / MODULAR_INDEX).exists()
    return tmp_path / "modular"


def test_a_modular_folder_is_refused_with_its_class(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"modular pipeline \(StableDiffusionXLModularPip"):
        model_folder(str(folder))
    with pytest.raises(ModelLoadError, match="which is not served") as caught:
        load_model("modular", folder)
    assert caught.value.reason.startswith("it is a modular pipeline (StableDiffusionXLModular")
    assert "save the same components" in caught.value.reason
    assert str(folder) not in caught.value.reason


def test_one_that_comes_with_code_of_its_own_runs_none(tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text("raise AssertionError('it was run')")
    index = {"_class_name": ["block", "OwnPipeline"]}
    (tmp_path / MODULAR_INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"modular pipeline \(OwnPipeline\)"):
        load_model("modular", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_index_that_says_no_class_is_refused_as_well(tmp_path: Path, text: str) -> None:
    (tmp_path / MODULAR_INDEX).write_text(text)
    with pytest.raises(ModelLoadError, match=r"modular pipeline \(of an unknown class\)"):
        load_model("modular", tmp_path)


def test_a_folder_with_both_indexes_is_that_of_the_other(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / MODULAR_INDEX).write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path
