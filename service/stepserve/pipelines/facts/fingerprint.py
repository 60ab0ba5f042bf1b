"""The fingerprint of a loaded model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from stepserve import __version__
from stepserve.domain.models import Fingerprint
from stepserve.pipelines.facts.trust import pickle_files


def take_fingerprint(
    folder: Path, dtype: torch.dtype, device: torch.device, others: Sequence[Path] = ()
) -> Fingerprint:
    """What decides the bytes of the images of the model in `folder`, besides the requests.

    Args:
        folder: of the pipeline.
        dtype: that it computes in.
        device: that it is on.
        others: files that were loaded into it, such as those of IP-Adapters.
    """
    return Fingerprint(
        weights=hash_weights(folder, others),
        stepserve=__version__,
        torch=str(torch.__version__),
        diffusers=version("diffusers"),
        transformers=version("transformers"),
        device=device.type,
        processor=_processor(device),
        dtype=str(dtype).removeprefix("torch."),
    )


def hash_weights(folder: Path, others: Sequence[Path] = ()) -> str:
    """SHA-256 over names and contents of all files with weights, and of what configures them.

    JSON files count in the folders of the pipeline's components only: those beside them say what
    Stepserve tells about the model. Of `others` the contents count, in their order.
    """
    total = hashlib.sha256()
    settings = {*folder.glob("*/*.json"), *folder.glob("*.py"), *folder.glob("*/*.py")}
    for path in sorted({*folder.rglob("*.safetensors"), *pickle_files(folder), *settings}):
        total.update(f"{path.relative_to(folder).as_posix()} {_hash_of(path)}\n".encode())
    for path in others:
        total.update(f"{_hash_of(path)}\n".encode())
    return total.hexdigest()


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
