"""Every command and setting that the documentation shows is written as what it names wants it.

Those that can be run here are run in `tests/integration/test_docs_examples.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from doc_commands import PAGES, REPOSITORY, SHELL, Block, Command, blocks, check, commands_of
from doc_commands import mentions as mentions_of
from stepserve.config import ConfigError, Settings


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_there_is(page: Path):
    shell = [block for block in blocks(page) if block.language in SHELL]
    for command in [c for block in shell for c in commands_of(block)] + list(mentions_of(page)):
        try:
            check(command)
        except Exception as error:
            error.add_note(f"{command.place}: {' '.join(command.words)}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_are_such(page: Path):
    for block in blocks(page):
        tree = yaml.safe_load(block.text) if block.language == "yaml" else None
        if isinstance(tree, dict) and set(tree) <= set(Settings.model_fields):
            Settings.model_validate(tree)


def test_blocks_say_their_language():
    named = {block.language for page in PAGES for block in blocks(page)}
    assert named <= {*SHELL, "python", "yaml", "json", "nginx", ""}, named


@pytest.mark.parametrize(
    "wrong",
    [
        "stepserve explains",
        "stepserve explain --promt x",
        "stepserve generate x --steps many",
        "make runs",
        "python -m loadtests.bensh",
        "python -m loadtests.bench --hosts x",
        "python docs/make_nothing.py",
        "locust -f loadtests/locustfile.py --usres 2",
        "pip install 'stepserve[nothing]'",
        "kubectl apply -k deploy/kubernetes/overlays/nothing",
        "kubectl -n nowhere get rayservice stepserve -o yaml",
        "kubectl -n stepserve get rayservice nothing -o yaml",
        "docker compose --profile nothing up",
        "docker build --target nothing .",
        "docker build --build-arg NOTHING=1 .",
        "docker run -e STEPSERVE_NOTHING=1 stepserve",
        "STEPSERVE_NOTHING=1 stepserve serve",
        "unheard-of --option",
    ],
)
def test_what_is_wrong_is_found(wrong: str):
    [command] = commands_of(Block(REPOSITORY / "README.md", 1, "bash", wrong))

    with pytest.raises((AssertionError, ConfigError, ValueError)):
        check(command)


def test_commands_are_split_as_a_shell_does():
    text = "A=1 stepserve keys create x \\\n  --file y && make run | head -c 1  # why\n"
    text += "cat <<'E'\nz\nE\n"
    found = list(commands_of(Block(REPOSITORY / "README.md", 1, "bash", text)))

    assert found[0] == Command(
        "README.md:1", {"A": "1"}, ("stepserve", "keys", "create", "x", "--file", "y")
    )
    assert [command.words for command in found[1:]] == [
        ("make", "run"),
        ("head", "-c", "1"),
        ("cat",),
    ]
