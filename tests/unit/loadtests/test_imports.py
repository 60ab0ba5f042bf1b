"""Every benchmark fits the code that it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import loadtests

FOLDER = Path(loadtests.__file__).parent
# locust replaces sockets when it is imported, and peers need packages that only they have.
PEERS, LOCUST = "peers", "locustfile"
MODULES = sorted(
    ".".join(("loadtests", *path.relative_to(FOLDER).with_suffix("").parts))
    for path in FOLDER.rglob("*.py")
    if PEERS not in path.parts and path.stem not in (LOCUST, "__init__")
)


def test_every_module_can_be_imported() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-c", code, *MODULES]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
