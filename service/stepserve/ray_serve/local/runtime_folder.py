"""The folder of a running local service: Ray's session, sockets, and the token that Ray asks for.

It is its user's alone, and goes when the service ends. What a killed service left is removed by the
next one that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from stepserve.private_files import check_way, write_private_file

PREFIX, NEW_PREFIX = "stepserve-run-", "stepserve-new-"
TOKEN_BYTES = 32
# Names of Unix sockets have 107 bytes at most.
LONGEST_BASE = (
    107 - len("/stepserve-run-12345678/ray/session_2026-01-01_00-00-00_000000_4194304") - 21
)
SHORT_BASE = Path("/tmp")  # noqa: S108 - what lies there is in a folder that is ours alone
# Ray's processes write a few last lines while they end.
REMOVAL_S = 5.0
PAUSE_S = 0.1


@dataclass(frozen=True)
class RuntimeFolder:
    """Where things of one running service are."""

    path: Path

    @property
    def ray(self) -> Path:
        """Where Ray keeps its session: logs, sockets, spilled objects."""
        return self.path / "r"

    @property
    def token(self) -> Path:
        """The file of the token that Ray's processes want from each other and from strangers."""
        return self.path / "token"


@contextmanager
def runtime_folder() -> Iterator[RuntimeFolder]:
    """Make the folder, with a fresh token in it, and remove it at the end.

    Raises:
        NotPrivateError: others could put one of theirs in its place.
    """
    base = _base()
    check_way(base)
    _remove_leftovers(base)
    # Of mode 0700: nobody else reaches what is below, whatever its mode.
    path = Path(tempfile.mkdtemp(prefix=NEW_PREFIX, dir=base))
    try:
        with _held(path):
            # Under its own name it is held already: an unheld one is a killed service's.
            path = path.rename(base / (PREFIX + path.name.removeprefix(NEW_PREFIX)))
            folder = RuntimeFolder(path)
            folder.ray.mkdir(mode=0o700)
            write_private_file(folder.token, secrets.token_hex(TOKEN_BYTES).encode())
            yield folder
    finally:
        _remove(path)


def _base() -> Path:
    """The folder for temporary files, if names of sockets below it are short enough."""
    wanted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    return wanted if len(os.fsencode(wanted)) <= LONGEST_BASE else SHORT_BASE


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock a folder until this process ends, however it ends.

    Whoever cleans temporary folders by age (systemd-tmpfiles) leaves locked ones alone as well.

    Raises:
        OSError: another process holds it, or it is no folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    deadline_s = time.monotonic() + REMOVAL_S
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)
        if time.monotonic() > deadline_s:
            return
        if path.exists():
            time.sleep(PAUSE_S)


def _remove_leftovers(base: Path) -> None:
    """Remove the folders of services that were killed, once none of their processes is left."""
    for path in base.glob(f"{PREFIX}*"):
        # Others may remove it at the same time, and those of other users are not ours to touch.
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid():
                continue
            with _held(path):
                if not _is_used(path):
                    _remove(path)


def _is_used(path: Path) -> bool:
    """Whether a process of this user has a file of a folder open; Ray's have their logs open."""
    inside = f"{path.resolve()}{os.sep}"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.pid != os.getpid() and process.uids().real == os.getuid()
            if is_ours and any(file.path.startswith(inside) for file in process.open_files()):
                return True
    return False
