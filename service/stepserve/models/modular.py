"""Folders of diffusers' modular pipelines, which are refused with their class."""

from __future__ import annotations

import json
from pathlib import Path

MODULAR_INDEX = "modular_model_index.json"
"""In place of a `model_index.json`."""


def modular_refusal(folder: Path) -> str | None:
    """Why a folder cannot be served, if it holds a modular pipeline and nothing else.

    No code of the folder is run, and no component read.
    """
    index = folder / MODULAR_INDEX
    if (folder / "model_index.json").exists() or not index.exists():
        return None
    return describe_modular(index)


def describe_modular(index: Path) -> str:
    """The same of the index file alone."""
    name = _class_name(index)
    return (
        f"it is a modular pipeline ({name}), which is not served: its blocks can be put together "
        "in any way, so that what a call takes and which steps it has cannot be read off its "
        "class; save the same components as one of diffusers' other pipelines, which writes a "
        "model_index.json"
    )


def _class_name(index: Path) -> str:
    try:
        named = json.loads(index.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return "of an unknown class"
    return str(named[-1] if isinstance(named, list) and named else named)
