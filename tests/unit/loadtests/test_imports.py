"""Every benchmark fits the code that it measures."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import loadtests

FOLDER = Path(loadtests.__file__).parent
# locust replaces sockets when it is imported, and peers need packages that only they have.
PEERS, LOCUST = "peers", "locustfile"
MODULES = sorted(
    ".".join(("loadtests", *path.relative_to(FOLDER).with_suffix("").parts))
    for path in FOLDER.rglob("*.py")
    if PEERS not in path.parts and path.stem not in (LOCUST, "__init__")
)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)
