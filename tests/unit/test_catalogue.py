"""Which folder the path of a model means."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepserve.models.catalogue import (
    EMBEDDED,
    ModelNotFoundError,
    embedded_models,
    model_folder,
)


def test_no_path_means_the_embedded_emoji() -> None:
    assert model_folder(None) == model_folder("embedded:emoji") == EMBEDDED


def test_every_embedded_model_has_a_name() -> None:
    for name, folder in embedded_models().items():
        assert model_folder(f"embedded:{name}") == folder
        assert (folder / "README.md").exists()


@pytest.mark.parametrize("path", ["embedded:", "embedded:Emoji", "embedded:../models/emoji"])
def test_an_embedded_model_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no embedded model .*there are: .*emoji"):
        model_folder(path)


def test_other_paths_are_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no diffusers pipeline in"):
        model_folder(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path
