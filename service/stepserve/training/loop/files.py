"""Files and folders that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one, never a part.

    Raises:
        OSError: the disk is full or refuses; the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Make what is in a file, or renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fresh_sibling(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then moved into its place.

    What an earlier, killed attempt left there is thrown away.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(partial: Path, folder: Path) -> None:
    """Move the finished `partial` to `folder`, and throw away what was there before.

    A crash leaves `folder` old or new; between its two renames it leaves it absent, with the old
    one beside it under the ending `.old`.
    """
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
