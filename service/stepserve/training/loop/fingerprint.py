"""What a checkpoint was made from, so that it is never continued with something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Fingerprint = Mapping[str, str]


def describe_settings(
    prefix: str, settings: DataclassInstance, without: Iterable[str] = ()
) -> dict[str, str]:
    """The fields of a config as `prefix.field: value`, leaving out those named in `without`."""
    left_out = set(without)
    fields = asdict(settings).items()
    return {f"{prefix}.{name}": repr(value) for name, value in fields if name not in left_out}


def digest_text(lines: Iterable[str]) -> str:
    """A short hash of lines of text, in their order."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def digest_weights(module: nn.Module) -> str:
    """A short hash of all parameters and buffers, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_tensors(*tensors: torch.Tensor) -> str:
    """A short hash of tensors on the CPU, bit by bit, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(stored: Mapping[str, Any], wanted: Fingerprint) -> list[str]:
    """One line for each value that differs: `loop.batch_size was 64, is now 32`."""
    names = sorted({*stored, *wanted})
    return [
        f"{name} was {stored.get(name, 'absent')}, is now {wanted.get(name, 'absent')}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]
