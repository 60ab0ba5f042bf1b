"""All families of the parity suite."""

from __future__ import annotations

import importlib
import pkgutil

import families
from families.family import Family


def _collect(prefix: str = "") -> dict[str, Family]:
    """The families of modules whose names begin so."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(families.__path__):
        if info.name == "catalogue" or not info.name.startswith(prefix):
            continue
        for family in getattr(importlib.import_module(f"families.{info.name}"), "FAMILIES", ()):
            assert family.name not in found, f"two families are called {family.name}"
            found[family.name] = family
    return dict(sorted(found.items()))


FAMILIES = _collect()
VIDEOS = frozenset(_collect("video_"))
"""Those that make videos, which are not served."""
