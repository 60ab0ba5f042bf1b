"""The secret of links, and whether results can be kept, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepserve.api.results.store import StoreUnusableError, open_store
from stepserve.config import ResultSettings
from stepserve.ray_serve.result_store import with_secret


def test_the_secret_is_read_from_its_file(tmp_path: Path):
    file = tmp_path / "secret.txt"
    file.write_text("a secret of sixteen\n")
    settings = ResultSettings(address="memory://x", secret_file=str(file))

    assert with_secret(settings).secret == "a secret of sixteen"
    assert open_store(settings.address, 60, with_secret(settings).secret)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read results.secret_file"),
        (b"\xff" * 20, "cannot read results.secret_file"),
        (b"  short \n", "holds 5 characters; the least is 16"),
    ],
)
def test_a_file_without_a_secret(tmp_path: Path, content: bytes | None, problem: str):
    file = tmp_path / "secret.txt"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(StoreUnusableError, match=problem):
        with_secret(ResultSettings(secret_file=str(file)))


def test_a_secret_that_others_may_write_is_refused(tmp_path: Path):
    file = tmp_path / "secret.txt"
    file.write_text("a secret of sixteen")
    file.chmod(0o666)
    with pytest.raises(StoreUnusableError, match="other users may write to"):
        with_secret(ResultSettings(secret_file=str(file)))


def test_a_folder_of_everybody_is_refused_before_anything_starts(tmp_path: Path):
    tmp_path.chmod(0o777)
    settings = ResultSettings(address=str(tmp_path), secret="a secret of sixteen")
    with pytest.raises(StoreUnusableError, match=r"other users may write to .*results\.address"):
        open_store(settings.address, 60, settings.secret)


def test_settings_without_a_file_are_left_as_they_are():
    settings = ResultSettings(secret="a secret of sixteen")

    assert with_secret(settings) is settings


def test_an_unknown_kind_of_store_is_told():
    settings = ResultSettings(address="nothing://x", secret="a secret of sixteen")

    with pytest.raises(StoreUnusableError, match="'nothing://x'"):
        open_store(settings.address, 60, settings.secret)
