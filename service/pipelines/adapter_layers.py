"""The LoRA layers inside the modules of a pipeline: whether a file fits, and switching them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from service.pipelines.adapter_files import AdapterFileError

_FACTOR = re.compile(r"(?P<component>\w+)\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


class AdapterSwitch:
    """Says which adapters the LoRA layers of one module apply, and how strongly.

    All layers look at one list of active adapters, so that switching costs no walk through the
    module. With an empty list a layer returns what the layer it wraps returns.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._active: list[str] = []
        self._layers: dict[str, list[Any]] = {}
        self._scales: dict[str, float] = {}
        self._variant: Hashable = None

    def refresh(self) -> None:
        """Find all layers and turn them off: after an adapter was loaded, or before one goes."""
        self._active.clear()
        self._layers.clear()
        self._scales.clear()
        self._variant = None
        for layer in tuner_layers(self._module):
            # PEFT keeps the very list.
            layer.set_adapter(self._active)
            for name in layer.scaling:
                self._layers.setdefault(name, []).append(layer)

    def is_set_to(self, variant: Hashable) -> bool:
        """Whether nothing has to be done for `variant`."""
        return self._variant == variant

    def set(self, variant: Hashable, scales: Sequence[tuple[str, float]]) -> None:
        """Apply exactly the adapters of `scales`, in that order, and remember it as `variant`."""
        # Should anything raise, nobody must think that it is set.
        self._variant = self
        for name, scale in scales:
            self._set_scale(name, scale)
        self._active[:] = [name for name, _ in scales]
        self._variant = variant

    def _set_scale(self, name: str, scale: float) -> None:
        if self._scales.get(name) != scale:
            for layer in self._layers.get(name, ()):
                layer.set_scale(name, scale)
            self._scales[name] = scale


def tuner_layers(module: torch.nn.Module) -> list[Any]:
    """Every layer that adapters were put around."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def settle_layers(module: torch.nn.Module) -> None:
    """New layers as the module's own: no dropout, and the memory layout of what they wrap."""
    for layer in tuner_layers(module):
        layer.eval()
        weight = getattr(layer.get_base_layer(), "weight", None)
        if _is_channels_last(weight):
            layer.to(memory_format=torch.channels_last)


def _is_channels_last(weight: torch.Tensor | None) -> bool:
    if weight is None or weight.dim() != 4:
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def check_fits(
    tensors: Mapping[str, torch.Tensor], components: Mapping[str, torch.nn.Module]
) -> None:
    """Refuse an adapter that was made for another model.

    Some loaders of diffusers would make room for it instead, in a model that all requests share.

    Raises:
        AdapterFileError: names the layer that is missing or has another size.
    """
    for name, tensor in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            continue
        if factor["component"] not in components:
            raise AdapterFileError(f"the model has no {factor['component']} that takes adapters")
        layer = _find_layer(components[factor["component"]], factor["layer"], name)
        _check_size(name, tensor, layer, factor["factor"])
        if factor["factor"] == "A":
            _check_rank(name, tensor, tensors.get(name.replace(".lora_A.", ".lora_B.")))


def _find_layer(module: torch.nn.Module, path: str, name: str) -> Any:
    # Recent versions of transformers have flattened CLIP; diffusers takes care of older files.
    for candidate in (path, path.removeprefix("text_model.")):
        try:
            layer = module.get_submodule(candidate)
        except AttributeError:
            continue
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    raise AdapterFileError(f"the model has no layer for {name}")


def _check_size(name: str, tensor: torch.Tensor, layer: Any, factor: str) -> None:
    side = "in" if factor == "A" else "out"
    size = getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))
    given = tensor.shape[1 if factor == "A" else 0]
    if size is not None and size != given:
        raise AdapterFileError(f"{name} is for {given} features and the model's layer has {size}")


def _check_rank(name: str, first: torch.Tensor, second: torch.Tensor | None) -> None:
    if second is None or first.shape[0] != second.shape[1]:
        raise AdapterFileError(f"the two factors of {name} do not fit together")


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
    containers = [getattr(layer, attribute) for attribute in layer.adapter_layer_names]
    parts = [container[name] for container in containers if name in container]
    return sum(
        1 if isinstance(part, torch.Tensor) else len(list(part.parameters())) for part in parts
    )
