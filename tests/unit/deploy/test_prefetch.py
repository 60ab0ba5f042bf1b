"""Models are whole before anybody looks at them, and what was fetched is not fetched again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from manifests import PRODUCTION, Object, groups, objects, pod, settings_of

SCRIPT_TIMEOUT_S = 60


def container(overlay: str, of: str, name: str) -> Object:
    (found,) = [c for c in pod(overlay, of).containers if c["name"] == name]
    return found


def variables(of: Object) -> dict[str, str]:
    return {v["name"]: v["value"] for v in of["env"] if "value" in v}


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_workers_wait_for_the_folder_that_the_job_fills_and_models_are_read_from(overlay: str):
    fetched = variables(container(overlay, "prefetch", "prefetch"))
    paths = {model.path for model in settings_of(overlay).models.values()}
    assert paths == {fetched["FOLDER"]}
    # Another revision goes to another folder, and to another Job, as Jobs cannot be changed.
    revision = fetched["REVISION"][:8]
    assert fetched["FOLDER"].endswith(f"-{revision}")
    (job,) = objects(overlay, "Job")
    assert job["metadata"]["name"].endswith(f"-{revision}")
    for group in groups(overlay)[1:]:
        first = group["template"]["spec"]["initContainers"][0]
        assert variables(first) == {"FOLDER": fetched["FOLDER"]}


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_one_writes_and_many_read_the_same_volume(overlay: str):
    (claim,) = objects(overlay, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (job,) = objects(overlay, "Job")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert not _reads_only(container(overlay, "prefetch", "prefetch"))
    for name in ("wait-for-models", "ray-worker"):
        assert _reads_only(container(overlay, "worker", name))
    # Its owner may write, whoever the storage says that is; without going over all files each time.
    for name in ("prefetch", "worker"):
        assert pod(overlay, name).spec["securityContext"]["fsGroup"] == 10001
        assert pod(overlay, name).spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def _reads_only(of: Object) -> bool:
    (mount,) = [m for m in of["volumeMounts"] if m["name"] == "models"]
    return bool(mount.get("readOnly"))


def run(of: Object, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a container's command with its own variables, at another folder."""
    command: list[Any] = [*of["command"], *of["args"]]
    if command[0] == "python":
        command[0] = sys.executable
    return subprocess.run(
        command,
        env=os.environ | variables(of) | {"FOLDER": str(folder)} | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=SCRIPT_TIMEOUT_S,
    )


def stand_in_hub(folder: Path, body: str) -> str:
    """A `huggingface_hub` of which a script calls one function, as the hub cannot be had here."""
    package = folder / "stand-in"
    package.mkdir(exist_ok=True)
    (package / "huggingface_hub.py").write_text(
        f"import pathlib\ndef snapshot_download(repo_id, *, revision, local_dir, **kw):\n{body}"
    )
    return str(package)


def test_a_fetch_that_breaks_off_is_not_taken_for_a_whole_one_and_goes_on(tmp_path: Path):
    of, folder = container("gpu", "prefetch", "prefetch"), tmp_path / "models"
    breaks_off = (
        "    local_dir.mkdir()\n    (local_dir / 'half').touch()\n    raise OSError('gone')\n"
    )
    ran = run(of, folder, PYTHONPATH=stand_in_hub(tmp_path, breaks_off))
    assert ran.returncode == 1, ran.stderr
    assert not (folder / ".complete").exists()

    goes_on = "    assert (local_dir / 'half').exists()\n    assert len(revision) == 40\n"
    ran = run(of, folder, PYTHONPATH=stand_in_hub(tmp_path, goes_on))
    assert ran.returncode == 0, ran.stderr
    assert (folder / ".complete").exists()

    ran = run(of, folder, PYTHONPATH=stand_in_hub(tmp_path, "    raise OSError('asked again')\n"))
    assert ran.returncode == 0, ran.stderr


def test_the_job_of_a_former_version_is_in_no_upgrades_way():
    """A Job cannot be changed, and its image is of the version: so it goes when it is done."""
    (job,) = objects("gpu", "Job")
    assert job["spec"]["ttlSecondsAfterFinished"] <= 3600


def test_what_the_script_asks_of_the_hub_is_what_the_library_takes():
    import inspect

    from huggingface_hub import snapshot_download

    script = container("gpu", "prefetch", "prefetch")["args"][0]
    asked = {line.split("=")[0].strip() for line in script.splitlines() if "=" in line}
    taken = set(inspect.signature(snapshot_download).parameters)
    assert {"revision", "local_dir", "allow_patterns", "ignore_patterns"} <= asked & taken


def test_a_worker_waits_until_the_model_is_whole(tmp_path: Path):
    """A stand-in for `sleep` ends the fetch while the worker waits."""
    folder, tools = tmp_path / "models", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    sleep = tools / "sleep"
    sleep.write_text('#!/bin/sh\ntouch "$FOLDER/.complete"\n')
    sleep.chmod(0o755)

    ran = run(
        container("gpu", "worker", "wait-for-models"),
        folder,
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("waiting for") == 1
