"""Keeps the folder that a person stands in off the import path, here and in processes started.

Off the paths of programs and shared libraries, too.

Whoever fills that folder (a download, a shared project) would otherwise decide what `import json`
means, in the service or in any Python process that it starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

PACKAGE_PARENT = Path(__file__).parents[1]


def leave_out_current_folder(
    environ: MutableMapping[str, str] = os.environ, import_path: list[str] = sys.path
) -> None:
    """Remove the current folder from the paths of this process and of those that it starts.

    It stays for this process if the service itself was imported from there.
    """
    # Python adds the folder again where it is started with `-c` or `-m`, as its own helpers are.
    environ["PYTHONSAFEPATH"] = "1"
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        # Nothing is found in a folder that has been removed.
        return
    modules = [str(Path(entry).resolve()) for entry in _entries(environ, "PYTHONPATH")]
    _set(environ, "PYTHONPATH", [entry for entry in modules if Path(entry) != here])
    for programs in ("PATH", "LD_LIBRARY_PATH"):
        found = _entries(environ, programs)
        _set(environ, programs, [entry for entry in found if Path(entry).is_absolute()])
    if here != PACKAGE_PARENT.resolve():
        import_path[:] = [entry for entry in import_path if Path(entry).resolve() != here]


def _entries(environ: Mapping[str, str], name: str) -> list[str]:
    """The folders that a variable lists, without empty ones: these stand for the current folder."""
    return [entry for entry in environ.get(name, "").split(os.pathsep) if entry]


def _set(environ: MutableMapping[str, str], name: str, entries: list[str]) -> None:
    if entries:
        environ[name] = os.pathsep.join(entries)
    else:
        environ.pop(name, None)
