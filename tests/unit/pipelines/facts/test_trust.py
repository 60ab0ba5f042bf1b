"""A model's folder may ask for code to be run; that happens only where the operator said so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file
from stepserve.composition import trust_of
from stepserve.config import ModelSettings
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.fingerprint import hash_weights
from stepserve.pipelines.facts.trust import Trust
from stepserve.pipelines.loading.folders import LoadedModel, load_model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"
CODE = """\
from pathlib import Path
from diffusers import {base}

Path({marker!r}).touch()


class Own({base}):
    pass
"""


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is run is copied into diffusers' cache first."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def set_in_index(folder: Path, key: str, value: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def load(folder: Path, trust: Trust | None = None) -> LoadedModel:
    return load_model("m", folder, "float32", "cpu", trust=trust)


def test_weights_in_pickles_only_are_refused(copied: Path):
    to_pickle(copied)
    with pytest.raises(ModelLoadError) as refused:
        load(copied, Trust(remote_code=True))

    assert PICKLE in refused.value.message
    assert "set allow_pickle: true" in refused.value.message


def test_pickles_are_read_where_that_is_allowed(copied: Path):
    weights = load_file(copied / WEIGHTS)
    to_pickle(copied)
    loaded = load(copied, Trust(pickle=True)).pipeline.unet.state_dict()

    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_pickles_beside_safetensors_are_let_be(copied: Path):
    (copied / PICKLE).write_bytes(b"never read")

    assert load(copied).capabilities.id == "m"
    assert load(copied, Trust(pickle=True)).capabilities.id == "m"


def test_pickles_that_belong_to_no_component_are_let_be(copied: Path):
    (copied / "checkpoint-500").mkdir()
    (copied / "checkpoint-500/optimizer.bin").write_bytes(b"never read")

    assert load(copied).capabilities.id == "m"


def test_weights_in_pickles_are_part_of_the_fingerprint(copied: Path):
    to_pickle(copied)
    before = hash_weights(copied)
    (copied / PICKLE).write_bytes(b"other")

    assert hash_weights(copied) != before


@pytest.fixture
def own_pipeline(copied: Path, tmp_path: Path) -> Path:
    """A folder whose pipeline is code of its own, which leaves a mark where it is run."""
    code = CODE.format(base="StableDiffusionPipeline", marker=str(tmp_path / "was-run"))
    (copied / "own_pipeline.py").write_text(code)
    set_in_index(copied, "_class_name", ["own_pipeline", "Own"])
    return copied


@pytest.fixture
def own_component(copied: Path, tmp_path: Path) -> Path:
    code = CODE.format(base="UNet2DConditionModel", marker=str(tmp_path / "was-run"))
    (copied / "unet/own_unet.py").write_text(code)
    set_in_index(copied, "unet", ["own_unet", "Own"])
    return copied


@pytest.mark.parametrize(
    ("fixture", "file"),
    [("own_pipeline", "own_pipeline.py"), ("own_component", "unet/own_unet.py")],
)
def test_code_of_a_folder_is_not_run(
    fixture: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
):
    folder: Path = request.getfixturevalue(fixture)
    with pytest.raises(ModelLoadError) as refused:
        load(folder, Trust(pickle=True))

    assert file in refused.value.message
    assert "set trust_remote_code: true" in refused.value.message
    assert not (tmp_path / "was-run").exists()


def test_code_of_a_folder_is_run_where_that_is_allowed(own_pipeline: Path, tmp_path: Path):
    pipeline = load(own_pipeline, Trust(remote_code=True)).pipeline

    assert type(pipeline).__name__ == "Own"
    assert (tmp_path / "was-run").exists()


def test_a_component_with_code_of_its_own(own_component: Path):
    unet = load(own_component, Trust(remote_code=True)).pipeline.unet

    assert type(unet).__name__ == "Own"


def test_code_is_part_of_the_fingerprint(own_pipeline: Path):
    before = hash_weights(own_pipeline)
    (own_pipeline / "own_pipeline.py").write_text("# other")

    assert hash_weights(own_pipeline) != before


def test_nothing_is_trusted_unless_the_settings_say_so():
    assert trust_of(ModelSettings()) == Trust() == Trust(remote_code=False, pickle=False)
    assert trust_of(ModelSettings(trust_remote_code=True)) == Trust(remote_code=True)
    assert trust_of(ModelSettings(allow_pickle=True)) == Trust(pickle=True)
