"""Rooms import one another in one direction only, and heavy libraries live in one room each.

    domain <- engine <- pipelines <- deployments        domain <- api <- deployments
    domain <- routing <- deployments
    telemetry, config and private_files: leaves that any room but domain may read

Imports inside functions and under TYPE_CHECKING count: they say who knows whom just the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[2] / "service" / "stepserve"
LEAVES = {"config", "telemetry", "private_files"}
ANY_ROOM = {"domain", "engine", "routing", "pipelines", "api", "ray_serve", "models", "training"}

# Which rooms a room may read, itself and `domain` left out.
MAY_READ = {
    "domain": set(),
    "config": set(),
    "telemetry": set(),
    "private_files": set(),
    "import_path": set(),
    "models": set(),
    "engine": LEAVES,
    "pipelines": LEAVES | {"engine"},
    "api": LEAVES,
    "routing": set(),
    "training": LEAVES | {"models"},
    "ray_serve": LEAVES | ANY_ROOM - {"training"},
    # The command line and what it prints are at the very top.
    "cli": LEAVES | ANY_ROOM | {"first_image", "doctor", "import_path"},
    "first_image": set(),
    "doctor": set(),
    "": set(),
}

# Only these rooms may import a library of this name; it is free to all others.
ONLY_IN = {
    "diffusers": {"pipelines", "training", "cli"},
    "transformers": {"pipelines", "training", "cli"},
    "tokenizers": {"pipelines", "training"},
    "safetensors": {"pipelines", "training"},
    "ray": {"ray_serve"},
    "fastapi": {"api", "ray_serve"},
    "starlette": {"api"},
    "greenlet": {"engine"},
    "torch": {"engine", "pipelines", "training"},
    "prometheus_client": {"telemetry"},
    "opentelemetry": {"telemetry"},
}
FASTAPI_IN_RAY_SERVE = {"ray_serve.ingress.ingress"}


@dataclass(frozen=True)
class Import:
    """One import statement: who imports what, and where."""

    module: str
    target: str
    line: int
    at_start: bool

    @property
    def room(self) -> str:
        return self.module.split(".")[0]

    @property
    def library(self) -> str:
        return self.target.split(".")[0]

    def __str__(self) -> str:
        return f"stepserve.{self.module}:{self.line} imports {self.target}"


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import of a module, at any depth; relative ones made absolute."""
    tree = ast.parse(source)
    at_start = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        for target in _targets(node, module):
            yield Import(module, target, getattr(node, "lineno", 0), id(node) in at_start)


def _targets(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = f"stepserve.{module}".split(".")[: -node.level] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        # `from stepserve import engine` reads a room by its name.
        return [f"{base}.{alias.name}" for alias in node.names] if base == "stepserve" else [base]
    return []


def forbidden(found: Import) -> bool:
    """Whether an import goes against the rules."""
    if found.library == "stepserve":
        return _forbidden_room(found)
    if found.room == "domain":
        return found.library not in sys.stdlib_module_names
    if found.library not in ONLY_IN:
        return False
    if found.room not in ONLY_IN[found.library]:
        return True
    if found.room == "cli":
        # Lazily, so that `--help` is quick.
        return found.at_start
    if (found.library, found.room) == ("fastapi", "ray_serve"):
        return found.module not in FASTAPI_IN_RAY_SERVE
    return False


def _forbidden_room(found: Import) -> bool:
    target = found.target.split(".")[1]
    if target in (found.room, "domain", "__version__"):
        return False
    return target not in MAY_READ[found.room]


def modules() -> list[tuple[str, Path]]:
    """All modules below `service/` with their dotted names, packages without `__init__`."""
    named = []
    for path in sorted(SERVICE.rglob("*.py")):
        parts = path.relative_to(SERVICE).with_suffix("").parts
        named.append((".".join(part for part in parts if part != "__init__"), path))
    return named


def test_imports_point_one_way() -> None:
    found = [i for module, path in modules() for i in imports_of(path.read_text(), module)]
    assert len(found) > 100
    assert [str(item) for item in found if forbidden(item)] == []


def test_every_room_has_rules() -> None:
    assert {module.split(".")[0] for module, _ in modules()} <= set(MAY_READ)


def test_rooms_form_no_cycle() -> None:
    below = {room: set(reads) - {room} for room, reads in MAY_READ.items()}
    while below:
        lowest = {room for room, reads in below.items() if not reads & set(below)}
        assert lowest, f"a cycle among {sorted(below)}"
        below = {room: reads for room, reads in below.items() if room not in lowest}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.track", "import diffusers"),
        ("engine.track", "from stepserve.pipelines import load"),
        ("engine.track", "from stepserve import pipelines"),
        ("engine.track", "from ..pipelines.load import load_model"),
        ("engine.track", "def f():\n    from transformers import CLIPTextModel"),
        (
            "pipelines.load",
            "if TYPE_CHECKING:\n    from stepserve.ray_serve.replica.replica import R",
        ),
        ("pipelines.load", "from stepserve.api.app import create_app"),
        ("pipelines.load", "import ray.serve"),
        ("api.app", "from stepserve.engine.loop.engine import Engine"),
        ("api.app", "import torch"),
        ("domain.errors", "import numpy"),
        ("domain.errors", "from stepserve.config import Settings"),
        ("training.loop", "from stepserve.pipelines.loading.folders import load_model"),
        ("deployments.replica", "from fastapi import FastAPI"),
        ("deployments.replica", "import diffusers"),
        ("cli", "import diffusers"),
        ("models.catalogue", "from stepserve.engine.loop.engine import Engine"),
        ("config", "import torch"),
        ("telemetry.catalogue", "import ray.util.metrics"),
        ("telemetry.catalogue", "from stepserve.engine.loop.observer import ForwardReport"),
        ("deployments.node_metrics", "import prometheus_client"),
        ("config", "from stepserve.engine.loop.engine import EngineOptions"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str) -> None:
    assert any(forbidden(found) for found in imports_of(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.track", "import torch, greenlet\nfrom stepserve.domain.errors import X"),
        ("engine.track", "from .call import Call"),
        ("pipelines.load", "import diffusers\nfrom stepserve.engine.loop.engine import Engine"),
        ("pipelines.images", "from stepserve import __version__"),
        ("api.app", "import fastapi\nfrom stepserve.config import Settings"),
        (
            "ray_serve.ingress.ingress",
            "from fastapi import FastAPI\nfrom stepserve.api.app import a",
        ),
        ("cli", "def f():\n    import diffusers"),
        ("domain.errors", "import json\nfrom stepserve.domain.events import Event"),
    ],
)
def test_allowed_imports_are_let_through(module: str, source: str) -> None:
    assert not any(forbidden(found) for found in imports_of(source, module))
