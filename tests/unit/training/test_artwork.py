"""Which emoji are wanted, how they are fetched and rendered."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stepserve.training.data.artwork import (
    PACKAGES,
    Artwork,
    ArtworkPackage,
    fetch_package,
    load_artwork,
    read_member,
    readable,
    render,
    render_package,
    wanted_names,
)
from stepserve.training.errors import ArtworkUnavailableError

NOTO, FLUENT = PACKAGES
SQUARE = '<path fill="#f00" d="M8 8h16v16H8z"/>'


def svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'


def archive_bytes(icons: dict[str, str]) -> bytes:
    """An npm archive of an Iconify package that has these icons, by name and SVG body."""
    files = {
        "icons.json": {
            "width": 32,
            "height": 32,
            "icons": {name: {"body": body} for name, body in icons.items()},
        },
        "metadata.json": {"categories": {"Objects": [*icons, "only-an-alias"]}},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


ARCHIVE = archive_bytes({"red-square": SQUARE, "empty": ""})
PACKAGE = ArtworkPackage("@x/y", "1.0.0", "test", "MIT", hashlib.sha256(ARCHIVE).hexdigest())


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


def test_unwanted_emoji_are_left_out() -> None:
    metadata: dict[str, object] = {
        "categories": {
            "Objects": ["key", "hammer"],
            "Travel & Places": ["one-oclock", "two-thirty", "house"],
            "Activities": ["person-running-medium-skin-tone", "ball-dark", "abc-tone3"],
            "People & Body": ["farmer"],
            "Flags": ["flag-peru"],
            "Symbols": ["red-circle"],
        }
    }
    assert wanted_names(metadata) == ["hammer", "house", "key"]


def test_names_become_words() -> None:
    assert readable("red-heart") == "red heart"
    assert readable("piata") == "pinata"


def test_svg_is_rendered_with_straight_alpha() -> None:
    pixels = render(svg(SQUARE), 32)
    assert pixels.shape == (32, 32, 4)
    assert pixels.dtype == np.uint8
    assert pixels[16, 16].tolist() == [255, 0, 0, 255]
    assert pixels[2, 2, 3] == 0


def test_edges_keep_their_colour() -> None:
    pixels = render(svg('<circle fill="#fff" cx="16" cy="16" r="10.3"/>'), 16)
    edge = pixels[(pixels[..., 3] > 30) & (pixels[..., 3] < 220)]
    assert len(edge) > 0
    assert edge[:, :3].min() > 240


def test_package_is_rendered_by_name(tmp_path: Path) -> None:
    archive = tmp_path / "test.tgz"
    archive.write_bytes(ARCHIVE)
    made = dict(render_package(PACKAGE, archive, 16))
    assert list(made) == ["empty", "red square"]
    assert made["red square"][8, 8].tolist() == [255, 0, 0, 255]


def test_npm_archive_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, 'echo run >> "$here/log"; cp "$here/archive" $to/a.tgz')
    cache = tmp_path / "cache"
    (cache / "download-test").mkdir(parents=True)  # what a killed fetch may leave behind
    (cache / "download-test" / "half.tgz").write_bytes(b"half")
    archive = fetch_package(PACKAGE, cache)
    assert archive.read_bytes() == ARCHIVE
    assert fetch_package(PACKAGE, cache) == archive
    assert (tmp_path / "bin" / "log").read_text() == "run\n"
    assert sorted(path.name for path in cache.iterdir()) == ["download-test", "test-1.0.0.tgz"]


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
    with pytest.raises(ArtworkUnavailableError, match=message):
        fetch_package(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtworkUnavailableError, match="npm was not found"):
        fetch_package(PACKAGE, tmp_path / "cache")


@pytest.mark.parametrize(
    "content", [b"", b"no archive", ARCHIVE[:100]], ids=["empty", "text", "cut off"]
)
def test_damaged_archive_is_named(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "test.tgz"
    archive.write_bytes(content)
    with pytest.raises(
        ArtworkUnavailableError, match=r"cannot be read from .*test\.tgz; delete it"
    ):
        read_member(archive, "icons.json")


def test_missing_member_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.tgz").write_bytes(ARCHIVE)
    with pytest.raises(ArtworkUnavailableError, match=r"chars\.json"):
        read_member(tmp_path / "test.tgz", "chars.json")


def test_rendered_artwork_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stepserve.training.data.artwork.PACKAGES", (PACKAGE, replace(PACKAGE, style="b"))
    )
    for style in ("test", "b"):
        (tmp_path / f"{style}-1.0.0.tgz").write_bytes(ARCHIVE)
    first = load_artwork(tmp_path, 16)
    for archive in tmp_path.glob("*.tgz"):
        archive.unlink()
    again = load_artwork(tmp_path, 16)
    assert isinstance(again, Artwork)
    assert again.names == first.names == ("empty", "red square", "empty", "red square")
    assert again.styles == ("test", "test", "b", "b")
    np.testing.assert_array_equal(again.pixels, first.pixels)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")
def test_real_package_comes_from_npm(tmp_path: Path) -> None:
    try:
        archive = fetch_package(FLUENT, tmp_path)
    except ArtworkUnavailableError as error:
        pytest.skip(f"npm reaches no registry: {error.message[:200]}")
    names = wanted_names(read_member(archive, "metadata.json"))
    assert {"pizza", "red-heart", "rocket"} <= set(names)
    assert not any("skin-tone" in name for name in names)


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
