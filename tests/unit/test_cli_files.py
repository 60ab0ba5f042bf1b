"""Files that the command line cannot write: told in a line, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import stepserve


def test_an_image_that_cannot_be_written_is_not_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    ended = stepserve("generate", "a red heart", "-o", str(file / "heart.png"), expect=1)
    assert ended.stdout == ""
    assert ended.stderr == f"error: {file}: File exists\n"
    ended = stepserve("generate", "a red heart", "-o", str(tmp_path), expect=1)
    assert ended.stderr == f"error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("content", ["", "# later\n"])
def test_an_empty_configuration_is_told_when_the_service_starts(
    tmp_path: Path, content: str
) -> None:
    config = tmp_path / "stepserve.yaml"
    config.write_text(content)
    # Refused right after it was read: other machines, and no keys.
    ended = stepserve("serve", "-c", str(config), "--host", "0.0.0.0", expect=1)
    assert ended.stdout == f"{config} holds no settings: the defaults are served\n"


def test_a_model_that_is_not_there_hides_no_other_from_the_list(tmp_path: Path) -> None:
    config = tmp_path / "stepserve.yaml"
    config.write_text(f"models: {{gone: {{path: {tmp_path}/gone}}, emoji: {{aliases: [icons]}}}}\n")
    ended = stepserve("models", "-c", str(config), expect=1)
    assert [line.split()[-4:] for line in ended.stdout.splitlines()] == [
        ["*", "gone", "bfloat16", f"{tmp_path}/gone"],
        ["bfloat16", "embedded", "(also", "icons)"],
    ]
    assert ended.stderr.startswith(f"error: model gone: no diffusers pipeline in {tmp_path}/gone: ")


def test_an_explanation_of_two_prompts_is_none(tmp_path: Path) -> None:
    ended = stepserve("explain", "a", "--prompt", "b", "-o", str(tmp_path / "out"), expect=1)
    assert ended.stdout == ""
    assert ended.stderr == "error: the prompt is said twice: 'a' and --prompt 'b'\n"
    assert not (tmp_path / "out").exists()
