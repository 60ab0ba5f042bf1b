"""How far a model's folder is trusted: it may hold code, and pickle files can hold code as well.

Nothing of it is run unless the operator says so for that model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

from stepserve.pipelines.errors import ModelLoadError

INDEX = "model_index.json"
CLASS_NAME = "_class_name"
SAFE = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SHOWN_FILES = 3


@dataclass(frozen=True)
class Trust:
    """What an operator allows a model's folder.

    Args:
        remote_code: whether Python code in the folder is run.
        pickle: whether weights are read from pickle files where there are no safetensors.
    """

    remote_code: bool = False
    pickle: bool = False


def check_trust(folder: Path, trust: Trust) -> None:
    """Return if the folder asks for no more than it is allowed, before anything of it is loaded.

    Raises:
        ModelLoadError: names the files, and the setting that would allow them.
    """
    index = read_index(folder)
    code = list(_code_files(folder, index))
    if code and not trust.remote_code:
        raise ModelLoadError(
            f"it comes with code of its own ({', '.join(code)}), and no code of a folder is run; "
            "if you trust it, set trust_remote_code: true for this model"
        )
    pickles = [path.relative_to(folder).as_posix() for path in pickle_files(folder)]
    if pickles and not trust.pickle:
        raise ModelLoadError(
            f"it has weights in pickle files only ({', '.join(pickles[:SHOWN_FILES])}), which may "
            "run code when they are read; save it with safetensors, or, if you trust it, set "
            "allow_pickle: true for this model"
        )


def read_index(folder: Path) -> dict[str, Any]:
    """What the folder says that it holds: the pipeline's class, and each component's."""
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


def pickle_files(folder: Path) -> list[Path]:
    """Pickle files of those components that have no safetensors."""
    found = []
    for component, named in read_index(folder).items():
        if isinstance(named, list) and component != CLASS_NAME and named[0] is not None:
            files = sorted((folder / component).glob("*"))
            if not any(file.suffix == SAFE for file in files):
                found += [file for file in files if file.suffix in PICKLES]
    return found


def find_pipeline_class(folder: Path) -> type:
    """The class that the folder names, looked up before gigabytes are read.

    Call `check_trust` before: code of the folder is run to get at its class.

    Raises:
        ModelLoadError: there is no such class.
    """
    name = read_index(folder)[CLASS_NAME]
    if isinstance(name, list):
        file, name = name
        found: type = get_class_from_dynamic_module(
            str(folder), module_file=f"{file}.py", class_name=name, trust_remote_code=True
        )
        return found
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ModelLoadError(f"diffusers has no pipeline {name!r}")
    pipeline_class: type = getattr(diffusers, name)
    return pipeline_class


def _code_files(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    for component, named in index.items():
        match named:
            case [str() as library, str()] if component == CLASS_NAME:
                yield f"{library}.py"
            case [str() as library, str()] if (folder / component / f"{library}.py").exists():
                yield f"{component}/{library}.py"
