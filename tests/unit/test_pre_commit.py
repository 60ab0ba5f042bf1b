"""The hooks of pre-commit are the parts of `make check`, and need no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


def test_hooks_are_the_parts_of_make_check():
    told = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.installed", "check"],
        cwd=REPOSITORY,
        # As a make of its own, also where make runs these tests.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    settings = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in settings["repos"] for hook in repository["hooks"]]

    assert [hook["entry"] for hook in hooks] == told.stdout.splitlines()
    assert {repository["repo"] for repository in settings["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}


def test_commands_of_hooks_exist():
    settings = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    for repository in settings["repos"]:
        for hook in repository["hooks"]:
            program = Path(hook["entry"].split()[0]).name
            assert (Path(sys.prefix) / "bin" / program).is_file(), hook["entry"]
