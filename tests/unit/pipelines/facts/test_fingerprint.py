from __future__ import annotations

import io
import pickle
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from stepserve import __version__
from stepserve.domain.models import Fingerprint
from stepserve.pipelines.facts.fingerprint import hash_weights, take_fingerprint
from stepserve.pipelines.loading.folders import LoadedModel

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere"))


def test_equal_models_have_equal_fingerprints(tiny_folder: Path, copied: Path) -> None:
    one, other = (take_fingerprint(folder, torch.float32, CPU) for folder in (tiny_folder, copied))
    assert one == other
    assert (one.digest, one.short) == (other.digest, other.short)
    assert re.fullmatch("[0-9a-f]{64}", one.digest)
    assert one.digest.startswith(one.short)
    assert len(one.short) == 16
    assert pickle.loads(pickle.dumps(one)) == one


def test_it_tells_what_it_is_made_of(tiny_folder: Path) -> None:
    told = take_fingerprint(tiny_folder, torch.bfloat16, CPU)
    assert told.stepserve == __version__
    assert told.torch == torch.__version__
    assert (told.device, told.dtype, told.row_buckets) == ("cpu", "bfloat16", "any rows")
    assert told.processor == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("field", [field.name for field in fields(Fingerprint)])
def test_every_ingredient_changes_it(tiny_folder: Path, field: str) -> None:
    one = take_fingerprint(tiny_folder, torch.float32, CPU)
    other = replace(one, **cast(Any, {field: "other"}))
    assert one.digest != other.digest
    assert one.short != other.short


def test_arguments_are_ingredients(tiny_folder: Path) -> None:
    taken = {
        take_fingerprint(tiny_folder, torch.float32, CPU),
        take_fingerprint(tiny_folder, torch.bfloat16, CPU),
        replace(take_fingerprint(tiny_folder, torch.float32, CPU), row_buckets="8, 16, 32"),
    }
    assert len({fingerprint.digest for fingerprint in taken}) == 3


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("vae/diffusion_pytorch_model.safetensors", True),
        ("scheduler/scheduler_config.json", True),
        ("unet/config.json", True),
        ("stepserve.json", False),
    ],
)
def test_weights_and_settings_of_components_count(copied: Path, name: str, counts: bool) -> None:
    before = hash_weights(copied)
    path = copied / name
    path.write_bytes(path.read_bytes() + b" ")
    assert (hash_weights(copied) != before) is counts


def test_names_count(copied: Path) -> None:
    before = hash_weights(copied)
    (copied / "unet").rename(copied / "denoiser")
    assert hash_weights(copied) != before


def test_a_loaded_model_has_one(tiny: LoadedModel, tiny_folder: Path) -> None:
    assert tiny.capabilities.fingerprint == take_fingerprint(tiny_folder, torch.float32, CPU)


class Reader(pickle.Unpickler):
    """Notes which packages are needed to read something."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.packages: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.packages.add(module.partition(".")[0])
        return super().find_class(module, name)


def test_who_is_told_of_a_model_needs_no_torch(tiny: LoadedModel) -> None:
    """Torch's own version number is of a class of torch: to import it took each reader 3 s."""
    reader = Reader(pickle.dumps(tiny.capabilities))
    assert reader.load() == tiny.capabilities
    assert reader.packages == {"stepserve"}
