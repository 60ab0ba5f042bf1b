"""The commands that the documentation shows, and whether what they name is there."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
import yaml
from stepserve.cli import app
from stepserve.config import PREFIX, load_settings

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "SECURITY.md",
        REPOSITORY / "service" / "stepserve" / "models" / "emoji" / "README.md",
        *(REPOSITORY / "docs").rglob("*.md"),
    ]
)
SHELL = ("bash", "console", "sh", "shell")
KUBECTL = {
    *("apply", "create", "delete", "describe", "diff", "exec", "get", "kustomize"),
    *("label", "logs", "port-forward", "rollout", "scale", "wait"),
}
OF_THE_SYSTEM = ("base64", "cat", "curl", "grep", "head", "helm", "kill", "openssl", "pgrep")
OF_RAY = ("ray", "serve")
UNFINISHED = ("MissingParameter", "BadOptionUsage")
"""Errors of commands that are named without what they need."""

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n)((?: {4}\S.*\n)+)", re.MULTILINE)
_HEREDOC = re.compile(r"<<'?(\w+)'?.*?\n\1\n", re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_INNER = re.compile(r"\$\(([^)]*)\)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]+=.*")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_OBJECT = re.compile(r"([a-z]+)/([a-z][a-z0-9-]*)")
_BETWEEN = {";", "&&", "||", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, which begins at a line of it."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One simple command: what is set for it, what is run, with what."""

    place: str
    variables: dict[str, str]
    words: tuple[str, ...]
    is_mention: bool = False

    @property
    def program(self) -> str:
        """Its name, without where it lies."""
        return self.words[0].rpartition("/")[2]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = ((m.start(), m[1], m[2]) for m in _FENCE.finditer(text))
    return [Block(page, text.count("\n", 0, at) + 1, kind, body) for at, kind, body in found]


def commands_of(block: Block) -> Iterator[Command]:
    """The simple commands of a block in shell."""
    text = _HEREDOC.sub("\n", block.text).replace("\\\n", " ")
    for line in text.splitlines():
        yield from _split(line, block.place, is_mention=False)


def mentions(page: Path) -> Iterator[Command]:
    """Commands in the prose of a page, also in lines that are indented as code."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    for match in _INDENTED.finditer(prose):
        for line in match[1].splitlines():
            yield from _known(line.strip(), _place(page, prose, match), is_mention=False)
    for match in _INLINE.finditer(prose):
        yield from _known(match[1].replace("\n", " "), _place(page, prose, match), is_mention=True)


def _place(page: Path, text: str, match: re.Match[str]) -> str:
    return f"{page.relative_to(REPOSITORY)}:{text.count(chr(10), 0, match.start()) + 1}"


def _known(text: str, place: str, *, is_mention: bool) -> Iterator[Command]:
    """Commands of `text`, if it begins with a program that is checked and says what it is to do."""
    if len(text.split()) < 2 or text.count("'") % 2 or text.count('"') % 2:
        return
    first = next(_split(text, place, is_mention=is_mention), None)
    if first is not None and first.program in CHECKS and not re.match(r"^\S+ [=<>]", text):
        yield from _split(text, place, is_mention=is_mention)


def _split(line: str, place: str, *, is_mention: bool) -> Iterator[Command]:
    for inner in _INNER.findall(line):
        yield from _split(inner, place, is_mention=is_mention)
    lexer = shlex.shlex(_INNER.sub("INNER", line), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _BETWEEN:
            words.append(word)
            continue
        variables = dict(w.split("=", 1) for w in words[: _leading(words)])
        simple = tuple(w for w in words[_leading(words) :] if w != "...")
        words = []
        if simple:
            yield Command(place, variables, simple, is_mention)


def _leading(words: list[str]) -> int:
    return next((i for i, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words))


def check(command: Command) -> None:
    """Return if a command names what there is.

    Raises:
        Exception: says what is wrong with it.
    """
    own = {name: value for name, value in command.variables.items() if name.startswith(PREFIX)}
    load_settings(None, own)
    assert command.program in CHECKS, f"nobody checks {command.program!r}"
    CHECKS[command.program](command)


def parse_stepserve(arguments: list[str], *, is_mention: bool = False) -> None:
    """Let the command line read arguments without doing anything."""
    group: Any = typer.main.get_command(app)
    while hasattr(group, "commands"):
        if not arguments and is_mention:
            return
        assert arguments, "a command is missing"
        name, *arguments = arguments
        assert name in group.commands, f"there is no command {name!r}"
        group = group.commands[name]
    try:
        group.make_context(group.name, list(arguments))
    except Exception as error:
        # Typer has a copy of click of its own, so that its errors are known by name.
        is_missing = is_mention and type(error).__name__ in UNFINISHED
        if not is_missing:
            raise ValueError(getattr(error, "message", error)) from error


def _stepserve(command: Command) -> None:
    parse_stepserve(list(command.words[1:]), is_mention=command.is_mention)


def _make(command: Command) -> None:
    made = _run("make", "--dry-run", "--always-make", *command.words[1:])
    assert made.returncode == 0, made.stderr


def _python(command: Command) -> None:
    match command.words[1:]:
        case ("-m", "venv", *_) | ("-c" | "-", *_) | ():
            pass
        case ("-m", module, *arguments):
            found = importlib.util.find_spec(module)
            assert found is not None, f"there is no module {module}"
            _check_options(_options_in(Path(found.origin or "")), arguments)
        case (script, *_):
            assert (REPOSITORY / script).is_file(), f"there is no {script}"


def _locust(command: Command) -> None:
    arguments = list(command.words[1:])
    if "-f" in arguments:
        file = REPOSITORY / arguments[arguments.index("-f") + 1]
        assert file.is_file(), f"there is no {file}"
        _check_options(_options_of_locust() | _options_in(file), arguments)


@functools.cache
def _options_of_locust() -> set[str]:
    told = _run(sys.executable, "-m", "locust", "--help")
    assert told.returncode == 0, told.stderr
    return set(re.findall(r"(?<!\w)--?[\w-]+", told.stdout))


def _options_in(file: Path) -> set[str]:
    """The options that a program adds to its parser: to ask it would import half of the world."""
    return set(re.findall(r'add_argument\(\s*"(--?[\w-]+)"', file.read_text(encoding="utf-8")))


def _check_options(known: set[str], arguments: list[str]) -> None:
    for argument in arguments:
        option = argument.partition("=")[0]
        assert not option.startswith("-") or option in known, f"there is no option {option}"


def _pip(command: Command) -> None:
    words = command.words
    if "-r" in words:
        assert (REPOSITORY / words[words.index("-r") + 1]).is_file()
    for extra in re.findall(r"stepserve\[(\w+)\]", " ".join(words)):
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        assert extra in project["optional-dependencies"], f"there is no extra {extra}"


@functools.cache
def _objects() -> list[dict[str, Any]]:
    files = [*KUBERNETES.rglob("*.yaml"), *KUBERNETES.rglob("*.yml")]
    found = [item for file in files for item in yaml.safe_load_all(file.read_text())]
    return [item for item in found if isinstance(item, dict)]


def _names(kind: str) -> set[str]:
    return {
        item["metadata"]["name"]
        for item in _objects()
        if item.get("kind", "").lower() == kind and "name" in item.get("metadata", {})
    }


def _kubectl(command: Command) -> None:
    words = list(command.words[1:])
    if "-n" in words:
        at = words.index("-n")
        assert words[at + 1] in _names("namespace"), f"there is no namespace {words[at + 1]}"
        del words[at : at + 2]
    assert words[0] in KUBECTL, f"kubectl has no {words[0]!r}"
    match words:
        case ["apply" | "delete" | "kustomize" | "diff", "-k", folder, *_]:
            _check_kustomization(REPOSITORY / folder)
        case ["create", "secret", "generic", name, *rest]:
            _check_secret(name, rest)
        case ["get" | "describe" | "delete", kind, name, *_] if _NAME.fullmatch(name):
            _check_object(kind, name)
    for word in words[1:]:
        if match := _OBJECT.fullmatch(word):
            _check_object(match[1], match[2])


def _check_secret(name: str, options: list[str]) -> None:
    told = " ".join(file.read_text() for file in KUBERNETES.rglob("*.yaml"))
    assert re.search(rf"(secretName|name): {name}\b", told), f"nothing reads secret {name}"
    for key in re.findall(r"--from-(?:file|literal)=([a-z][\w.-]+)", " ".join(options)):
        assert key in told, f"nothing reads {key} of secret {name}"


def _check_object(kind: str, name: str) -> None:
    if kind == "svc":
        # KubeRay makes it of the RayService's name.
        kind, name = "rayservice", re.sub("-(serve|head)-svc$", "", name)
    assert name in _names(kind), f"there is no {kind} {name}"


def _check_kustomization(folder: Path) -> None:
    file = folder / "kustomization.yaml"
    assert file.is_file(), f"there is no {file}"
    tree = yaml.safe_load(file.read_text())
    for named in [*tree.get("resources", ()), *tree.get("components", ())]:
        target = folder / named
        assert target.exists(), f"there is no {target}"
        if target.is_dir():
            _check_kustomization(target)


def _docker(command: Command) -> None:
    words = command.words[1:]
    match words:
        case ("build", *options):
            _check_build(options)
        case ("compose", *options):
            compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
            known = {p for s in compose["services"].values() for p in s.get("profiles", ())}
            given = {b for a, b in pairwise(options) if a == "--profile"}
            assert given <= known, f"there are no profiles {given - known}"
            assert options[-1] in ("up", "ps", "down")
        case ("run", *options):
            given_variables = [b for a, b in pairwise(options) if a == "-e"]
            load_settings(None, dict(text.split("=", 1) for text in given_variables))
        case _:
            raise AssertionError("nobody checks this form")


def _check_build(options: list[str]) -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    for option, value in pairwise(options):
        if option == "--target":
            assert re.search(rf"(?i)^FROM .* AS {value}$", dockerfile, re.MULTILINE), value
        if option == "--build-arg":
            assert re.search(rf"^ARG {value.partition('=')[0]}\b", dockerfile, re.MULTILINE), value
    assert (REPOSITORY / options[-1]).is_dir()


def _image_check(command: Command) -> None:
    script = (REPOSITORY / command.words[0]).read_text()
    for name in command.variables:
        assert f"${{{name}" in script or f"${name}" in script, f"{name} is not read"


def _nothing(command: Command) -> None:
    """Tools of the system with few words, which are run where they can be."""


CHECKS: dict[str, Callable[[Command], None]] = {
    "stepserve": _stepserve,
    "make": _make,
    "python": _python,
    "python3": _python,
    "python3.11": _python,
    "locust": _locust,
    "pip": _pip,
    "kubectl": _kubectl,
    "docker": _docker,
    "check_image.sh": _image_check,
    **dict.fromkeys((*OF_THE_SYSTEM, *OF_RAY), _nothing),
}


def check_python(block: Block) -> None:
    """Return if a block is Python whose imports there are."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.place}: no {alias.name}"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
