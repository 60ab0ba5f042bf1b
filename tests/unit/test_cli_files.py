"""Files that the command line cannot write: told in a line, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepserve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_image_that_cannot_be_written_is_not_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    ended = run("generate", "a red heart", "-o", str(file / "heart.png"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {file}: File exists\n"
    ended = run("generate", "a red heart", "-o", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr == f"error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("content", ["", "# later\n"])
def test_an_empty_configuration_is_told_when_the_service_starts(
    tmp_path: Path, content: str
) -> None:
    config = tmp_path / "stepserve.yaml"
    config.write_text(content)
    command = [sys.executable, "-m", "stepserve.cli", "serve", "-c", str(config)]
    # Refused right after it was read: other machines, and no keys.
    command += ["--host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stdout == f"{config} holds no settings: the defaults are served\n"


def test_a_model_that_is_not_there_hides_no_other_from_the_list(tmp_path: Path) -> None:
    config = tmp_path / "stepserve.yaml"
    config.write_text(f"models: {{gone: {{path: {tmp_path}/gone}}, emoji: {{aliases: [icons]}}}}\n")
    ended = run("models", "-c", str(config))
    assert ended.returncode == 1
    assert [line.split()[-4:] for line in ended.stdout.splitlines()] == [
        ["*", "gone", "bfloat16", f"{tmp_path}/gone"],
        ["bfloat16", "embedded", "(also", "icons)"],
    ]
    assert ended.stderr.startswith(f"error: model gone: no diffusers pipeline in {tmp_path}/gone: ")


def test_an_explanation_of_two_prompts_is_none(tmp_path: Path) -> None:
    ended = run("explain", "a", "--prompt", "b", "-o", str(tmp_path / "out"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: the prompt is said twice: 'a' and --prompt 'b'\n"
    assert not (tmp_path / "out").exists()
