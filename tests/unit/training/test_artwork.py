"""Which emoji are wanted, and how they are rendered."""

from __future__ import annotations

import hashlib
import io
import json
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
    load_artwork,
    readable,
    render,
    render_package,
    wanted_names,
)
from stepserve.training.data.packages import fetch_package, read_member
from stepserve.training.errors import PackageUnavailableError

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
PACKAGE = ArtworkPackage("@x/y", "1.0.0", "MIT", hashlib.sha256(ARCHIVE).hexdigest(), "test")


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


def test_rendered_artwork_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stepserve.training.data.artwork.PACKAGES", (PACKAGE, replace(PACKAGE, style="b"))
    )
    (tmp_path / PACKAGE.archive_name).write_bytes(ARCHIVE)
    first = load_artwork(tmp_path, 16)
    (tmp_path / PACKAGE.archive_name).unlink()
    again = load_artwork(tmp_path, 16)
    assert isinstance(again, Artwork)
    assert again.names == first.names == ("empty", "red square", "empty", "red square")
    assert again.styles == ("test", "test", "b", "b")
    np.testing.assert_array_equal(again.pixels, first.pixels)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")
def test_real_package_comes_from_npm(tmp_path: Path) -> None:
    try:
        archive = fetch_package(FLUENT, tmp_path)
    except PackageUnavailableError as error:
        pytest.skip(f"npm reaches no registry: {error.message[:200]}")
    names = wanted_names(read_member(archive, "metadata.json"))
    assert {"pizza", "red-heart", "rocket"} <= set(names)
    assert not any("skin-tone" in name for name in names)
