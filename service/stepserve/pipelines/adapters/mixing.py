"""Which adapters may differ from row to row of a forward, and why others may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from stepserve.pipelines.adapters.checks import FileLayer

RowLayers = Mapping[str, frozenset[str]]
"""By component whose forwards requests share, paths of layers whose inputs begin with the rows."""

BASES = (nn.Linear, nn.Conv2d, nn.Conv3d)
"""Layers that may have other adapters for each row."""

NOT_MIXED = "a forward of this model has one set of adapters"
_TUNERS = (lora.Linear, lora.Conv2d, lora.Conv3d)
_PLAIN_PARTS = {"lora_A.weight", "lora_B.weight"}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def obstacle(
    name: str,
    layers: Iterable[FileLayer],
    components: Mapping[str, nn.Module],
    row_layers: RowLayers,
) -> str:
    """Why a loaded adapter cannot be mixed with others in a forward; empty if it can.

    What it does to a text encoder is no obstacle: a forward of that is for one request.

    Args:
        name: that PEFT knows the adapter by.
        layers: of its file.
        components: the modules that it was loaded into.
        row_layers: layers whose rows can be told apart.
    """
    if not row_layers:
        return NOT_MIXED
    for layer in layers:
        if layer.component not in row_layers:
            continue
        reason = _layer_obstacle(name, layer, components[layer.component], row_layers)
        if reason:
            return f"its layer {layer.component}.{layer.path} {reason}"
    return ""


def can_mix_in(layer: Any) -> bool:
    """Whether a layer of PEFT can add something else to each row."""
    if not isinstance(layer, _TUNERS):
        return False
    base: Any = layer.get_base_layer()
    # Other classes may compute anything, and quantized weights are no numbers.
    return type(base) in BASES and base.weight.dtype in _DTYPES


def _layer_obstacle(
    name: str, layer: FileLayer, component: nn.Module, row_layers: RowLayers
) -> str:
    tuner: Any = component.get_submodule(layer.path)
    if not layer.parts.keys() <= _PLAIN_PARTS:
        return f"has more than two factors ({', '.join(sorted(layer.parts))})"
    if not can_mix_in(tuner) or name in tuner.lora_variant:
        return "is of a kind whose rows are not mixed"
    if tuner.lora_A[name].weight.dtype is not tuner.get_base_layer().weight.dtype:
        return "has factors of another dtype than the layer"
    if layer.path not in row_layers[layer.component]:
        return "does not get its rows one after the other"
    return ""
