"""A trained pipeline as a standard diffusers folder: bfloat16 safetensors, model card, licences."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import stepserve.models
from stepserve.training.data.packages import NpmPackage
from stepserve.training.errors import ExportError
from stepserve.training.loop.files import fresh_sibling, replace_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TEMPLATES = Path(stepserve.models.__file__).parent / "templates"
MAX_FOLDER_BYTES = 50_000_000
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
LIBRARIES = (
    "diffusers",
    "numpy",
    "pillow",
    "resvg-py",
    "safetensors",
    "stepserve",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Documents:
    """What lies beside the weights of a model.

    `card` becomes README.md, `training` training.json, and `manifest` stepserve.json; `licences`
    names files in `models/templates/LICENSES`.
    """

    card: str
    training: dict[str, Any]
    manifest: dict[str, Any]
    licences: tuple[str, ...]


def export_pipeline(
    pipeline: DiffusionPipeline,
    documents: Documents,
    folder: Path,
    max_bytes: int = MAX_FOLDER_BYTES,
) -> Path:
    """Save a trained pipeline with its documents; `pipeline` becomes bfloat16.

    The folder appears as a whole, in place of an older one.

    Returns:
        `folder`.

    Raises:
        ExportError: it is over `max_bytes`, holds a pickle, or does not load again.
    """
    partial = fresh_sibling(folder)
    pipeline.to(torch.bfloat16)
    for name in modules(pipeline):
        getattr(pipeline, name).to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(partial, safe_serialization=True)
    write_json(partial / "training.json", documents.training)
    write_json(partial / "stepserve.json", documents.manifest)
    (partial / "README.md").write_text(documents.card, encoding="utf-8")
    (partial / "LICENSES").mkdir()
    for licence in documents.licences:
        shutil.copy(TEMPLATES / "LICENSES" / licence, partial / "LICENSES")
    _open_permissions(partial)
    check_promises(partial, max_bytes)
    replace_folder(partial, folder)
    return folder


def describe_training(
    pipeline: DiffusionPipeline,
    command: str,
    recipe: DataclassInstance,
    packages: Iterable[NpmPackage],
    images: int,
) -> dict[str, Any]:
    """The whole recipe and what it was run with, as plain values."""
    return {
        "command": command,
        "recipe": asdict(recipe),
        "packages": [asdict(package) for package in packages],
        "images": images,
        "parameters": count_parameters(pipeline),
        "python": platform.python_version(),
        "versions": {name: library_version(name) for name in LIBRARIES},
    }


def check_promises(folder: Path, max_bytes: int = MAX_FOLDER_BYTES) -> None:
    """Whether a model folder is small, free of pickles, and loads again.

    Raises:
        ExportError: names what is wrong.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if pickles:
        raise ExportError(f"only safetensors may hold weights, but there is {', '.join(pickles)}")
    total_bytes = sum(path.stat().st_size for path in files)
    if total_bytes > max_bytes:
        limit = f"the {max_bytes / 1e6:.0f} MB limit"
        raise ExportError(f"the model takes {total_bytes / 1e6:.1f} MB, more than {limit}")
    try:
        DiffusionPipeline.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"the saved model does not load again: {error}") from error


def modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}


def count_parameters(pipeline: DiffusionPipeline) -> dict[str, int]:
    """Parameters of each part."""
    parts = modules(pipeline).items()
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts}


def weights_mb(pipeline: DiffusionPipeline) -> str:
    """What the weights take in bfloat16, in whole megabytes."""
    return f"{2 * sum(count_parameters(pipeline).values()) / 1e6:.0f}"


def library_version(library: str) -> str:
    """The version of an installed library, or `not installed`."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain values as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open_permissions(folder: Path) -> None:
    # safetensors writes files that only their owner may read, and images copy modes.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
