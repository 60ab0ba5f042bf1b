"""No module of the current folder is imported, in this process or in those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stepserve.import_path import PACKAGE_PARENT, leave_out_current_folder

# Started as Python's own helpers (multiprocessing, for example) are.
LOOK = "import sys, json, multiprocessing.resource_tracker; print(json.__file__)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, whose modules leave a mark."""
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__)\n"
    for name in ("json", "yaml", "typer", "torch", "multiprocessing", "ray", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(mark)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("listed", [None, "", ":", ".", "{here}", ":{lib}:", "{lib}:{here}:."])
def test_processes_that_are_started_import_nothing_from_there(
    folder: Path, listed: str | None
) -> None:
    lib = folder / "lib"
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if listed is not None:
        environ["PYTHONPATH"] = listed.format(here=folder, lib=lib)
    leave_out_current_folder(environ, [])
    for command in (["-c", LOOK], ["-m", "json.tool", "--help"], ["-m", "typer", "--help"]):
        subprocess.run([sys.executable, *command], env=environ, check=True, capture_output=True)
    assert not (folder / "mark").exists()
    kept = environ.get("PYTHONPATH")
    assert kept == (str(lib) if listed and "lib" in listed else None)


def test_this_process_imports_nothing_from_there(folder: Path) -> None:
    import_path = ["", ".", str(folder), f"{folder}/lib/..", str(folder / "lib"), sys.prefix]
    leave_out_current_folder({}, import_path)
    assert import_path == [str(folder / "lib"), sys.prefix]


def test_programs_and_libraries_are_not_looked_for_there(folder: Path) -> None:
    environ = {"PATH": f":/bin:.:{folder}:lib", "LD_LIBRARY_PATH": ":/lib"}
    leave_out_current_folder(environ, [])
    # Whoever names it in full means it, such as one who stands in /usr/bin.
    assert environ["PATH"] == f"/bin:{folder}"
    assert environ["LD_LIBRARY_PATH"] == "/lib"
    environ = {"LD_LIBRARY_PATH": ":"}
    leave_out_current_folder(environ, [])
    assert "LD_LIBRARY_PATH" not in environ


def test_the_current_folder_may_have_been_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    environ: dict[str, str] = {"PYTHONPATH": "lib"}
    leave_out_current_folder(environ, [""])
    assert environ["PYTHONSAFEPATH"] == "1"


def test_the_service_may_lie_in_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE_PARENT)
    import_path = ["", sys.prefix]
    leave_out_current_folder({}, import_path)
    assert import_path == ["", sys.prefix]


@pytest.mark.parametrize("arguments", [["--version"], ["models"], ["config", "check"]])
@pytest.mark.parametrize("how", ["stepserve", "python -m"])
def test_commands_import_nothing_from_there(folder: Path, how: str, arguments: list[str]) -> None:
    # Python itself puts the folder first for `-m`, and a few modules are found before ours.
    script = Path(sys.executable).with_name("stepserve")
    start = [str(script)] if how == "stepserve" else [sys.executable, "-m", "stepserve.cli"]
    subprocess.run([*start, *arguments], check=True, capture_output=True)
    assert not (folder / "mark").exists()
