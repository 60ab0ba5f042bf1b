"""Which step caches a loaded model has."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from stepserve.config import SpeedSettings, StepCacheSettings
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.step_cache.magnitudes import FILE

EASYCACHE, MAGCACHE = StepCacheMethod.EASYCACHE, StepCacheMethod.MAGCACHE
MAGNITUDES = (1.0, 1.5, 1.25)


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def calibrated(folder: Path, *magnitudes: float) -> Path:
    (folder / FILE).write_text(json.dumps({"magnitudes": magnitudes}))
    return folder


def load(folder: Path, **step_cache: object) -> LoadedModel:
    settings = StepCacheSettings.model_validate(step_cache) if step_cache else None
    speed = SpeedSettings(step_cache=settings)
    return load_model("x", folder, dtype="float32", device="cpu", speed=speed)


def test_a_model_without_magnitudes_has_no_magcache(tiny: LoadedModel) -> None:
    assert tiny.capabilities.step_cache_methods == (EASYCACHE,)
    assert tiny.capabilities.default_step_cache is None
    assert tiny.magnitudes == ()


def test_a_model_with_magnitudes_has_both(copied: Path) -> None:
    model = load(calibrated(copied, *MAGNITUDES), method="magcache", threshold=0.2)

    assert model.magnitudes == MAGNITUDES
    assert model.capabilities.step_cache_methods == (EASYCACHE, MAGCACHE)
    assert model.capabilities.default_step_cache == StepCacheUse(MAGCACHE, 0.2)


def test_other_magnitudes_are_another_fingerprint(copied: Path, tiny: LoadedModel) -> None:
    one = load(calibrated(copied, *MAGNITUDES)).capabilities.fingerprint
    other = load(calibrated(copied, 1.0, 1.5, 1.5)).capabilities.fingerprint
    none = tiny.capabilities.fingerprint

    assert one is not None
    assert other is not None
    assert none is not None
    assert one.weights == other.weights == none.weights
    assert len({one.digest, other.digest, none.digest}) == 3


def test_magnitudes_that_are_wrong_leave_the_model_without_magcache(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated(copied, 1.0, -1.0)
    with caplog.at_level(logging.WARNING):
        model = load(copied)

    assert model.capabilities.step_cache_methods == (EASYCACHE,)
    assert f"model x has no magcache: {copied / FILE} has -1.0 at magnitudes[1]" in caplog.text


def test_a_default_that_wants_other_magnitudes_is_refused(copied: Path) -> None:
    with pytest.raises(ModelLoadError, match="measure it with `stepserve calibrate x`") as missing:
        load(copied, method="magcache")
    with pytest.raises(ModelLoadError, match=r"has -1.0 at magnitudes\[1\]") as wrong:
        load(calibrated(copied, 1.0, -1.0), method="magcache")

    for error in (missing.value, wrong.value):
        assert str(copied) not in error.reason
        assert f"it has no {FILE} that can be used" in error.reason
