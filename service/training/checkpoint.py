"""Training checkpoints: atomic to write, safe to read (tensors and plain values only)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from service.training.files import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts of tensors and plain values) atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
