"""Models that lie on a hub: fetched at a commit, kept, and served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_hub import REVISION, local_hub
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.step_cache.magnitudes import FILE as MAGNITUDES
from stepserve.pipelines.step_cache.magnitudes import read_magnitudes

HUB_ID = "somebody/emoji"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The embedded model as others publish theirs: with files beside it that nobody needs."""
    folder = tmp_path / "repository"
    shutil.copytree(EMBEDDED, folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (folder / "emoji-all-in-one.safetensors").write_bytes(b"for other programs")
    return folder


def stepserve(
    tmp_path: Path, hub: str, *arguments: str, revision: str = REVISION
) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "stepserve.yaml"
    models = {"fetched": {"path": HUB_ID, "revision": revision}}
    config.write_text(yaml.safe_dump({"models": models}))
    command = [sys.executable, "-m", "stepserve.cli", *arguments, "--config", str(config)]
    variables = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def draw(
    tmp_path: Path, hub: str, output: str, revision: str = REVISION
) -> subprocess.CompletedProcess[str]:
    wanted = ["generate", "red heart", "--steps", "4", "--seed", "3"]
    return stepserve(tmp_path, hub, *wanted, "-o", str(tmp_path / output), revision=revision)


def test_a_modular_pipeline_is_refused_with_its_class(tmp_path: Path) -> None:
    repository = tmp_path / "modular"
    repository.mkdir()
    index = '{"_class_name": "FluxModularPipeline"}'
    (repository / "modular_model_index.json").write_text(index)
    with local_hub(HUB_ID, repository) as hub:
        refused = draw(tmp_path, hub.url, "none.png")
    assert refused.returncode != 0
    assert "it is a modular pipeline (FluxModularPipeline), which is not served" in refused.stderr


def test_a_model_is_fetched_once_and_served_without_the_hub_from_then_on(
    tmp_path: Path, repository: Path
) -> None:
    with local_hub(HUB_ID, repository) as hub:
        first = draw(tmp_path, hub.url, "first.png")
        assert first.returncode == 0, first.stderr
        assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
        assert "unet/diffusion_pytorch_model.bin" not in hub.fetched
        assert "emoji-all-in-one.safetensors" not in hub.fetched
        assert "step_cache.json" in hub.fetched
        assert len(hub.fetched) == len(set(hub.fetched))
    again = draw(tmp_path, hub.url, "again.png")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    listed = stepserve(tmp_path, hub.url, "models")
    assert f"{HUB_ID} at {REVISION}" in listed.stdout


def test_what_calibrates_a_model_is_found_again_in_the_cache(
    tmp_path: Path, repository: Path
) -> None:
    (repository / MAGNITUDES).unlink()
    with local_hub(HUB_ID, repository) as hub:
        measured = stepserve(tmp_path, hub.url, "calibrate", "--steps", "6", "--prompt", "a cat")
        assert measured.returncode == 0, measured.stderr
    written = Path(measured.stdout.strip())
    assert written.is_relative_to(tmp_path / "cache")
    assert len(read_magnitudes(written.parent)) == 6

    wanted = ["generate", "a cat", "--steps", "6", "--step-cache", "magcache:1"]
    cached = stepserve(tmp_path, hub.url, *wanted, "-o", str(tmp_path / "cat.png"))
    assert cached.returncode == 0, cached.stderr
    assert "4 of 6 denoiser calls ran" in cached.stderr


def test_a_commit_that_is_not_there_is_told(tmp_path: Path, repository: Path) -> None:
    with local_hub(HUB_ID, repository) as hub:
        missing = draw(tmp_path, hub.url, "none.png", revision="f" * 40)
    assert missing.returncode == 1
    assert f"{HUB_ID} at {'f' * 40} cannot be fetched" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_branch_is_no_commit(tmp_path: Path) -> None:
    refused = draw(tmp_path, "http://127.0.0.1:9", "none.png", revision="main")
    assert refused.returncode == 1
    assert "models.fetched.revision" in refused.stderr


FIND = """
import json, sys
from stepserve.composition import find_ip_adapters
from stepserve.config import ModelSettings
settings = ModelSettings.model_validate({"ip_adapters": {"style": json.loads(sys.argv[1])}})
(files,) = find_ip_adapters(settings)
print(files.weights)
print(files.image_encoder)
"""


def test_of_an_ip_adapter_only_its_own_files_are_fetched(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    wanted = [
        "models/style.safetensors",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
    ]
    others = ["models/other.safetensors", "models/image_encoder/pytorch_model.bin", "README.md"]
    for name in [*wanted, *others]:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)
    settings = {
        "path": "somebody/adapters",
        "revision": REVISION,
        "subfolder": "models",
        "weight_name": "style.safetensors",
    }
    with local_hub("somebody/adapters", repository) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        found = subprocess.run(
            [sys.executable, "-c", FIND, json.dumps(settings)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
    assert found.returncode == 0, found.stderr
    weights, encoder = map(Path, found.stdout.split())
    assert weights.read_text() == wanted[0]
    assert (encoder / "config.json").read_text() == wanted[1]
    assert sorted(hub.fetched) == sorted(wanted)
