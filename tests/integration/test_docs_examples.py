"""What the documentation shows, run as it stands, and in its order, against a real service.

What cannot be run here is named below with the reason; whether its commands are written rightly is
seen to in `tests/unit/test_docs_commands.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from doc_commands import (
    PAGES,
    REPOSITORY,
    SHELL,
    Block,
    blocks,
    check_python,
    commands_of,
    mentions,
    parse_stepserve,
)
from running_service import Service
from stepserve.models.catalogue import EMBEDDED

ADDRESS = "http://127.0.0.1:8000"
LONG = "takes minutes to hours; its suites run the same programs with less to do"
CONTAINERS = "needs docker, or a cluster with KubeRay; deploy's own suites check what they start"

# Page, how the block begins, and why it is not run.
NOT_RUN = {
    ("README.md", "make run"): "serves until it is stopped, as the `service` of these tests does",
    ("CONTRIBUTING.md", "make"): "runs these tests",
    ("docs/getting-started.md", "docker compose"): CONTAINERS,
    ("docs/getting-started.md", ".venv/bin/stepserve train"): (
        "trains for two hours; test_training_loop.py"
    ),
    (
        "docs/api.md",
        'import base64\nimport httpx\n\nurl = "http://127.0.0.1:8000/v1/images/upscale"',
    ): ("needs an upscaler; test_upscalers_over_http.py"),
    ("docs/benchmarks.md", "python -m loadtests.race"): LONG,
    ("docs/load-testing.md", ".venv/bin/locust"): "loads for two minutes; test_load.py",
    ("docs/load-testing.md", ".venv/bin/python -m loadtests.bench"): LONG,
    ("docs/load-testing.md", ".venv/bin/python -m loadtests.endurance"): "test_endurance.py",
    ("docs/load-testing.md", "python3.11 -m venv"): LONG,
    ("docs/models.md", "kill -HUP"): "signals the oldest service of the machine, whosever it is",
    ("docs/models.md", "# torchrun"): "needs two GPUs",
    ("docs/operations.md", "docker build"): CONTAINERS,
    ("docs/operations.md", "docker compose"): CONTAINERS,
    ("docs/operations.md", "helm repo"): CONTAINERS,
    ("docs/operations.md", "CLUSTER="): CONTAINERS,
    ("docs/operations.md", "kubectl apply"): CONTAINERS,
    ("docs/security.md", ".venv/bin/stepserve keys"): "serves until it is stopped, for HOST",
    ("docs/step-cache.md", ".venv/bin/stepserve calibrate"): (
        "would write the embedded model's own file; test_cli.py calibrates a copy"
    ),
    ("docs/training.md", "stepserve train"): "trains for an hour; test_folder_training.py",
    ("docs/traces.md", "OTEL_EXPORTER"): "serves until it is stopped; test_traces.py",
}
# Of these subcommands every use is run, wherever it stands.
SHORT = ("config", "doctor", "explain", "generate", "keys", "models")


def is_run(block: Block) -> bool:
    page = str(block.page.relative_to(REPOSITORY))
    named = [key for key in NOT_RUN if key[0] == page and block.text.startswith(key[1])]
    return not named and block.language in (*SHELL, "python")


def make_sandbox(folder: Path) -> Path:
    """A folder that looks like the repository; what commands write stays in it."""
    for path in REPOSITORY.iterdir():
        if path.name not in (".venv", ".git", "out"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command: list[str], folder: Path) -> None:
    # `stepserve` and `python3` of the examples are the ones that the tests run with.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        command,
        cwd=folder,
        # Two at once would have more threads than there are cores.
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{command[-1]}\n{ran.stdout}{ran.stderr}"


PAGES_THAT_RUN = [page for page in PAGES if any(map(is_run, blocks(page)))]


def run_examples(page: Path, url: str, folder: Path) -> set[str]:
    """Run them in their order; returns the names of the files that are there at the end."""
    for block in filter(is_run, blocks(page)):
        code = block.text.replace(ADDRESS, url)
        code = code.replace("path/to/this/folder", str(EMBEDDED))
        in_shell = block.language in SHELL
        shell = ["bash", "-euo", "pipefail", "-c"]
        run([*(shell if in_shell else [sys.executable, "-c"]), code], folder)
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def examples(
    service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[set[str]]]]:
    """Those of two pages run at once: most of their time goes into imports."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            page: pool.submit(
                run_examples, page, service.url, make_sandbox(tmp_path_factory.mktemp("page"))
            )
            for page in PAGES_THAT_RUN
        }


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_the_examples_run_in_their_order(page: Path, examples: dict[Path, Future[set[str]]]):
    made = examples[page].result()
    if page.name == "api.md":
        assert {"heart.png", "sunflower-7.webp", "sunflower-8.webp", "completed.png"} <= made
        assert {"edited.json", "variations.json", "events.txt", "batch.json"} <= made
    if page == REPOSITORY / "README.md":
        assert {"rocket.png", "heart.png", "blue.png", "sunflower-7.png"} <= made


def short_commands() -> list[tuple[str, ...]]:
    """The uses of `stepserve` that end by themselves, in prose and in blocks that are not run."""
    found = [command for page in PAGES for command in mentions(page)]
    not_run = [b for page in PAGES for b in blocks(page) if b.language in SHELL and not is_run(b)]
    found += [command for block in not_run for command in commands_of(block)]
    words = {c.words[1:] for c in found if c.program == "stepserve" and c.words[1] in SHORT}
    return sorted(filter(_is_whole, words))


def _is_whole(words: tuple[str, ...]) -> bool:
    """Whether it could be run: prose may name a command without what it needs."""
    try:
        parse_stepserve(list(words))
    except ValueError:
        return False
    return True


def test_commands_that_end_by_themselves(service: Service, tmp_path: Path):
    short, sandbox = short_commands(), make_sandbox(tmp_path)

    def run_one(words: tuple[str, ...]) -> None:
        here = [
            word.replace("http://HOST:8000", ADDRESS).replace(ADDRESS, service.url)
            for word in words
        ]
        run(["stepserve", *(["doctor", service.url] if here == ["doctor"] else here)], sandbox)

    # Keys are made in one file.
    of_keys = [words for words in short if words[0] == "keys"]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run_one, words) for words in short if words not in of_keys]
        for words in of_keys:
            run_one(words)
    for one in running:
        one.result()

    assert {words[0] for words in short} >= {"config", "doctor", "explain", "keys"}
    assert any("--prompt" in words for words in short)
    assert (sandbox / "keys.yaml").is_file()
    assert (sandbox / "out" / "explain-reverse.png").is_file()


def test_what_is_not_run_is_there_and_can_be_read():
    written = {(str(b.page.relative_to(REPOSITORY)), b) for page in PAGES for b in blocks(page)}
    for page, beginning in NOT_RUN:
        assert any(p == page and b.text.startswith(beginning) for p, b in written), beginning
    for _, block in written:
        if block.language == "python" and not is_run(block):
            check_python(block)
