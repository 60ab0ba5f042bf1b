"""The folder of a running service: private, and gone afterwards, however the service ends."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stepserve.private_files import NotPrivateError
from stepserve.ray_serve.local.runtime_folder import LONGEST_BASE, runtime_folder

# Holds a folder; a child of its own has a log file there open, as Ray's processes have.
HOLDER = """
import signal, subprocess, sys
from stepserve.ray_serve.local.runtime_folder import runtime_folder
with runtime_folder() as folder:
    log = (folder.ray / "log").open("w")
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], stdout=log)
    print(folder.path, child.pid, flush=True)
    signal.pause()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files with a short name, which those of tests do not have."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_this_users_alone_and_goes_with_all_in_it(base: Path) -> None:
    with runtime_folder() as folder:
        assert folder.path.parent == base
        assert mode_of(folder.path) == 0o700
        assert mode_of(folder.token) == 0o600
        assert [path.name[:14] for path in base.iterdir()] == ["stepserve-run-"]
        (folder.ray / "session" / "logs").mkdir(parents=True)
    assert list(base.iterdir()) == []


def test_it_goes_when_the_start_fails(base: Path) -> None:
    with pytest.raises(RuntimeError, match="no start"), runtime_folder():
        raise RuntimeError("no start")
    assert list(base.iterdir()) == []


def test_it_is_made_in_no_folder_where_others_could_move_it(base: Path) -> None:
    base.chmod(0o777)
    with pytest.raises(NotPrivateError, match=f"other users may write to {base}"):
        runtime_folder().__enter__()
    base.chmod(0o1777)
    with runtime_folder() as folder:
        assert folder.path.exists()


def test_each_service_has_a_token_of_its_own(base: Path) -> None:
    with runtime_folder() as one, runtime_folder() as other:
        tokens = {one.token.read_text(), other.token.read_text()}
    assert [len(token) for token in tokens] == [64, 64]


def test_what_a_killed_service_left_is_removed_once_its_processes_are_gone(base: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left, child = holder.stdout.readline().split()
    with runtime_folder():
        assert Path(left).exists(), "it runs"
    holder.kill()
    holder.communicate()
    with runtime_folder():
        assert Path(left).exists(), "one of its processes has a file open"
    orphan = psutil.Process(int(child))
    orphan.kill()
    # Nobody may be there to fetch its exit status.
    while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
        pass
    with runtime_folder() as folder:
        assert list(base.iterdir()) == [folder.path]


def test_folders_of_others_and_other_folders_stay(base: Path) -> None:
    (base / "stepserve-results-0").mkdir()
    (base / "stepserve-run-file").touch()
    (base / "stepserve-run-link").symlink_to(base / "stepserve-results-0")
    with runtime_folder():
        pass
    assert len(list(base.iterdir())) == 3


def test_names_of_sockets_are_short_enough(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = base / ("x" * LONGEST_BASE)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with runtime_folder() as folder:
        assert folder.path.parent == Path("/tmp")
