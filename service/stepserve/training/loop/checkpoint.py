"""Training checkpoints: atomic to write, safe to read (tensors and plain values only)."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from stepserve.private_files import check_own, read_private_file
from stepserve.training.errors import CheckpointError
from stepserve.training.loop.files import write_atomically
from stepserve.training.loop.fingerprint import Fingerprint, differences


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts of tensors and plain values) atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none.

    Raises:
        CheckpointError: the file is no checkpoint, or damaged.
        NotPrivateError: others wrote it, or may write to it or to its folder.
    """
    if not path.exists():
        return None
    check_own(path.parent)
    content = io.BytesIO(read_private_file(path))
    try:
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint; delete it to start over"
        ) from error
    return state


def check_origin(path: Path, state: dict[str, Any], wanted: Fingerprint) -> None:
    """Refuse a checkpoint that other settings or data made. One that tells nothing is believed.

    Raises:
        CheckpointError: lists what differs.
    """
    stored = state.get("fingerprint")
    differing = differences(stored, wanted) if stored is not None else []
    if differing:
        raise CheckpointError(
            f"{path} belongs to another training ({'; '.join(differing)}); "
            "restore those values, or choose another folder"
        )
