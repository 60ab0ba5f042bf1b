"""The LoRA layers inside the modules of a pipeline, and whether a file fits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from stepserve.pipelines.adapters.checks import FileLayer
from stepserve.pipelines.adapters.files import AdapterFileError


def tuner_layers(module: torch.nn.Module) -> list[Any]:
    """Every layer that adapters were put around."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def settle_layers(module: torch.nn.Module) -> None:
    """New layers as the module's own: no dropout, and the memory layout of what they wrap."""
    for layer in tuner_layers(module):
        layer.eval()
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or weight.dim() != 4:
            continue
        if weight.is_contiguous(memory_format=torch.channels_last):
            layer.to(memory_format=torch.channels_last)


def check_fits(layers: Iterable[FileLayer], components: Mapping[str, torch.nn.Module]) -> None:
    """Refuse an adapter that was made for another model.

    Some loaders of diffusers would make room for it instead, in a model that all requests share.

    Raises:
        AdapterFileError: names the layer that has another size.
    """
    for layer in layers:
        if layer.is_lokr:
            # PEFT takes no other sizes.
            continue
        module: Any = components[layer.component].get_submodule(layer.path)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        first, second = layer.parts["lora_A.weight"], layer.parts["lora_B.weight"]
        _check_size(layer.names["lora_A.weight"], first.shape[1], base, "in")
        _check_size(layer.names["lora_B.weight"], second.shape[0], base, "out")
        if first.shape[0] != second.shape[1]:
            name = layer.names["lora_A.weight"]
            raise AdapterFileError(f"the two factors of {name} do not fit together")


def _check_size(name: str, given: int, base: Any, side: str) -> None:
    size = getattr(base, f"{side}_features", getattr(base, f"{side}_channels", None))
    if size is not None and size != given:
        raise AdapterFileError(f"{name} is for {given} features and the model's layer has {size}")


def check_complete(
    name: str, tensors: Mapping[str, torch.Tensor], components: Mapping[str, torch.nn.Module]
) -> None:
    """Refuse a loaded adapter that has more or fewer tensors than its file.

    A file may say that it is for other layers than it holds; the rest would be left to chance.

    Raises:
        AdapterFileError: names the component.
    """
    loaded = 0
    for component, module in components.items():
        given = [n for n in tensors if n.startswith(f"{component}.") and not n.endswith(".alpha")]
        held = sum(_count_tensors(layer, name) for layer in tuner_layers(module))
        if held != len(given):
            raise AdapterFileError(f"it has {len(given)} tensors for {held} in the {component}")
        loaded += held
    if not loaded:
        raise AdapterFileError("it has no layer for this model")


def _count_tensors(layer: Any, name: str) -> int:
    # PEFT names what DoRA adds twice.
    names = dict.fromkeys(layer.adapter_layer_names)
    containers = [getattr(layer, attribute) for attribute in names]
    parts = [container[name] for container in containers if name in container]
    return sum(
        1 if isinstance(part, torch.Tensor) else len(list(part.parameters())) for part in parts
    )
