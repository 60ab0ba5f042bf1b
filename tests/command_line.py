"""The command line in this process: to start another takes longer than all that is tried."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest
from stepserve import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def stepserve(*arguments: str, expect: int = 0) -> Ended:
    """Run a command as a user types it."""
    stdout, stderr, returncode = io.StringIO(), io.StringIO(), 0
    # The command takes the current folder off it, where other tests find modules.
    import_path = list(sys.path)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["stepserve", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            # As the interpreter does it.
            returncode = ended.code if isinstance(ended.code, int) else bool(ended.code)
            if isinstance(ended.code, str):
                print(ended.code, file=stderr)
        finally:
            sys.path[:] = import_path
    assert returncode == expect, stderr.getvalue()
    return Ended(returncode, stdout.getvalue(), stderr.getvalue())
