"""What the contracts of import-linter (`pyproject.toml`, run by `make check`) cannot say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

PACKAGE = Path(__file__).parents[2] / "service" / "stepserve"
MOST_FILES = 13


def test_no_folder_holds_more_files_than_one_can_look_over() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert len(folders) > 30
    counts = {folder: len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_the_domain_needs_the_standard_library_alone() -> None:
    graph = grimp.build_graph("stepserve", include_external_packages=True)
    domain = graph.find_descendants("stepserve.domain")
    imported = {
        target for module in domain for target in graph.find_modules_directly_imported_by(module)
    }
    libraries = {target.partition(".")[0] for target in imported} - {"stepserve"}
    assert libraries <= set(sys.stdlib_module_names)


def test_images_are_made_and_explained_on_the_command_line_without_ray() -> None:
    parts = "composition", "pipelines.serving.local", "training.drawing.explain"
    modules = ", ".join(f"stepserve.{part}" for part in ("cli", *parts))
    code = f"import sys, {modules}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "torch" in loaded
    assert "ray" not in loaded


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, stepserve.cli; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()).isdisjoint({"torch", "diffusers", "transformers", "ray"})
