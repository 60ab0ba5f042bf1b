"""Files that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = (REPOSITORY / "service" / "stepserve", REPOSITORY, REPOSITORY / "docs")
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/routing.md", "docs/models.md")

_PATH = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yml|yaml|toml|md|js))`|`((?:[\w.-]+/)+)`")


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    named = {file or folder for file, folder in _PATH.findall(text)}
    assert named
    missing = [path for path in named if not any((root / path).exists() for root in ROOTS)]
    assert not missing
