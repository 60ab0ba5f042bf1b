"""Open emoji artwork: fetched from npm by package name, rendered from SVG to RGBA images.

Two sets are used: Noto Emoji (Apache-2.0) and Fluent Emoji Flat (MIT). Skin-tone variants, flags,
people, clock faces and abstract symbols are left out: at 64 px they are hard to tell apart, and a
small model that must remember fewer images remembers them better.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from stepserve.training.data.packages import NpmPackage, fetch_package, read_member
from stepserve.training.errors import PackageUnavailableError
from stepserve.training.loop.files import write_atomically

KEPT_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
SKIN_TONES = re.compile(r"skin-tone|-tone\d|-(light|medium|dark)$")
CLOCK_FACES = re.compile(r"-(oclock|thirty)$")
MISSPELT = {"piata": "pinata"}


@dataclass(frozen=True)
class ArtworkPackage(NpmPackage):
    """A package of icons in Iconify's JSON format, all drawn in one style."""

    style: str


PACKAGES = (
    ArtworkPackage(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto",
    ),
    ArtworkPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent",
    ),
)


@dataclass(frozen=True)
class Artwork:
    """Rendered images with their names and styles, in the same order.

    `pixels` has shape (images, size_px, size_px, 4), uint8, straight (not premultiplied) alpha.
    """

    pixels: npt.NDArray[np.uint8]
    names: tuple[str, ...]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def wanted_names(metadata: dict[str, object]) -> list[str]:
    """Icon names worth learning, sorted, from an Iconify `metadata.json`."""
    categories = metadata["categories"]
    assert isinstance(categories, dict)
    names = {name for category in KEPT_CATEGORIES for name in categories.get(category, [])}
    return sorted(n for n in names if not SKIN_TONES.search(n) and not CLOCK_FACES.search(n))


def readable(name: str) -> str:
    """`red-heart` -> `red heart`."""
    return MISSPELT.get(name, name).replace("-", " ")


def render(svg: str, size_px: int) -> npt.NDArray[np.uint8]:
    """Render SVG text to (size_px, size_px, 4) uint8, drawn twice as large and scaled down.

    Raises:
        PackageUnavailableError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise PackageUnavailableError(
            "resvg-py was not found: install stepserve with its `train` extra"
        ) from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size_px, height=2 * size_px))
    large = Image.open(io.BytesIO(png)).convert("RGBA")
    # Scaling must happen on premultiplied colours, or transparent pixels bleed into the edges.
    small = large.convert("RGBa").resize((size_px, size_px), Image.Resampling.BOX).convert("RGBA")
    return np.asarray(small)


def render_package(
    package: ArtworkPackage, archive: Path, size_px: int
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield (name, pixels) for every wanted icon of one package."""
    icons_file = read_member(archive, "icons.json")
    icons = icons_file["icons"]
    assert isinstance(icons, dict)
    for name in wanted_names(read_member(archive, "metadata.json")):
        if name not in icons:
            continue
        icon = icons[name]
        width = icon.get("width", icons_file.get("width", 16))
        height = icon.get("height", icons_file.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        yield readable(name), render(svg, size_px)


def load_artwork(cache: Path, size_px: int = 128) -> Artwork:
    """Fetch and render all packages, or read the result of an earlier call from `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    versions = "-".join(package.version for package in PACKAGES)
    rendered = cache / f"artwork-{versions}-{size_px}px.npz"
    if not rendered.exists():
        _render_all(cache, size_px, rendered)
    with np.load(rendered) as stored:
        return Artwork(
            pixels=stored["pixels"],
            names=tuple(stored["names"].tolist()),
            styles=tuple(stored["styles"].tolist()),
        )


def _render_all(cache: Path, size_px: int, target: Path) -> None:
    names: list[str] = []
    styles: list[str] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    for package in PACKAGES:
        archive = fetch_package(package, cache)
        for name, image in render_package(package, archive, size_px):
            names.append(name)
            styles.append(package.style)
            pixels.append(image)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, pixels=np.stack(pixels), names=np.array(names), styles=np.array(styles)
    )
    write_atomically(target, buffer.getvalue())
