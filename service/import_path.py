"""Keeps the folder that a person stands in off the import path, here and in processes started.

Whoever fills that folder (a download, a shared project) would otherwise decide what `import json`
means, in the service or in any Python process that it starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

PACKAGE_PARENT = Path(__file__).parents[1]


def leave_out_current_folder(
    environ: MutableMapping[str, str] = os.environ, import_path: list[str] = sys.path
) -> None:
    """Remove the current folder from the import path of this process and of those it starts.

    It stays for this process if the service itself was imported from there.
    """
    here = Path.cwd().resolve()
    # Python adds the folder again where it is started with `-c` or `-m`, as its own helpers are.
    environ["PYTHONSAFEPATH"] = "1"
    listed = environ.pop("PYTHONPATH", "")
    # An empty entry, such as a colon at the end leaves, stands for the current folder.
    kept = [str(Path(entry).resolve()) for entry in listed.split(os.pathsep) if entry]
    kept = [entry for entry in kept if Path(entry) != here]
    if kept:
        environ["PYTHONPATH"] = os.pathsep.join(kept)
    if here != PACKAGE_PARENT.resolve():
        import_path[:] = [entry for entry in import_path if Path(entry).resolve() != here]
