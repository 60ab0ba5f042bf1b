"""Does a loaded adapter do what its file says? Every layer is compared, and its scaling mended."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepserve.pipelines.adapters.contents import AdapterContents, module_path
from stepserve.pipelines.adapters.files import FACTOR, AdapterFileError
from stepserve.pipelines.loading.weights import is_finite

_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB]\.(weight|bias)|lora_magnitude_vector|lokr_w[12](_[ab])?)"
)
# Factors in half precision are scaled by converters, which rounds.
STRENGTH_TOLERANCE = 0.01
SCALING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FileLayer:
    """What a file says of one layer of the model.

    Args:
        path: of the layer in its component.
        parts: its tensors by PEFT's names: `lora_A.weight`, `lora_B.weight`, `lora_B.bias`,
            `lora_magnitude_vector` of DoRA, or those of LoKr, such as `lokr_w1` and `lokr_w2`.
        names: what the tensors are called where they were read, by part.
        scaling: what the product of the factors is multiplied with at a scale of 1.
    """

    component: str
    path: str
    parts: Mapping[str, Tensor]
    names: Mapping[str, str]
    scaling: float

    @property
    def is_lokr(self) -> bool:
        """Whether it is a Kronecker product of two factors, and not a product."""
        return any(part.startswith("lokr") for part in self.parts)

    @property
    def strength(self) -> float:
        """How much it adds to the layer's output, in one number."""
        if self.is_lokr:
            return _lokr_strength(self.parts) * self.scaling**2
        first, second = self.parts["lora_A.weight"], self.parts["lora_B.weight"]
        return _strength(first, second, self.scaling)


def layers_of(
    read: Mapping[str, Tensor],
    alphas: Mapping[str, Any],
    contents: AdapterContents,
    components: Mapping[str, nn.Module],
) -> list[FileLayer]:
    """The layers of a file, as diffusers' loader was given them.

    Args:
        read: tensors by component and path, in one of diffusers' layouts.
        alphas: by the names that diffusers' converters give them.
        contents: what was read from the file.
        components: the modules that adapters go into.

    Raises:
        AdapterFileError: names a tensor that is for no layer of the model.
    """
    layers = []
    for component, names in _by_component(read, components).items():
        found: dict[str, dict[str, str]] = {}
        for standard, name in _standard_names(component, names).items():
            part = _PART.fullmatch(standard)
            if part is None:
                continue
            path = module_path(components[component], part["path"])
            if path is None:
                raise AdapterFileError(f"the model has no layer for {component}.{name}")
            found.setdefault(path, {})[part["part"]] = f"{component}.{name}"
        for path, own in found.items():
            layers.append(_layer(component, path, own, (read, alphas, contents)))
    return layers


def for_text_encoders(
    read: Mapping[str, Tensor], layers: Iterable[FileLayer], components: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The same tensors; those of text encoders in the one layout that diffusers always knows.

    It makes out the layout of a text encoder by one layer of it, which a file may lack.
    """
    renamed = dict(read)
    for layer in layers:
        if not layer.component.startswith("text_encoder"):
            continue
        for part, name in layer.names.items():
            factor = part.replace("lora_A", "down").replace("lora_B", "up")
            new = f"{layer.component}.{layer.path}.lora_linear_layer.{factor}"
            renamed[new] = renamed.pop(name)
    return renamed


def check_loaded(
    adapter: str, layers: Iterable[FileLayer], components: Mapping[str, nn.Module]
) -> int:
    """Compare each layer with the file; returns how many were given another scaling.

    Raises:
        AdapterFileError: names a layer that is not what the file says.
    """
    return sum(_settle(adapter, layer, components[layer.component]) for layer in layers)


def check_strengths(contents: AdapterContents, layers: Iterable[FileLayer]) -> None:
    """Refuse a file of which something was lost or changed on the way to diffusers' layout.

    Converters rename, split and turn round the rows of factors, none of which changes the sum of
    the squares of what a layer adds to its output.

    Raises:
        AdapterFileError: names a layer of the file.
    """
    if contents.config is not None:
        return
    given = _file_strengths(contents.tensors)
    left = [layer.strength for layer in layers]
    missing = {}
    for name, strength in given.items():
        nearest = min(left, key=lambda other: abs(other - strength), default=math.inf)
        if _is_close(strength, nearest):
            left.remove(nearest)
        else:
            missing[name] = strength
    if not _is_close(sum(missing.values()), sum(left)):
        name = next(iter(missing), "another layer")
        raise AdapterFileError(
            f"diffusers does not read {name!r} as the file has it: what it adds there would be "
            f"{sum(left):.4g} instead of {sum(missing.values()):.4g}, as a sum of squares"
        )


def _by_component(
    read: Mapping[str, Tensor], components: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in read:
        component, _, rest = name.partition(".")
        if component not in components:
            if name.endswith(".alpha"):
                continue
            hint = " (PEFT's own layout)" if component == "base_model" else ""
            raise AdapterFileError(
                f"its tensor {name!r} is for no layer of the model: the model has no {component} "
                f"that takes adapters{hint}"
            )
        names.setdefault(component, []).append(rest)
    return names


def _standard_names(component: str, names: list[str]) -> dict[str, str]:
    """By PEFT's names, those of older layouts of diffusers."""
    known: dict[str, str] = {name: name for name in names}
    if not component.startswith("text_encoder"):
        if any(".lora_A." in name for name in names):
            return known
        return dict(convert_unet_state_dict_to_peft(known))
    for layout in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        known = convert_state_dict_to_peft(known, original_type=layout)
    return known


def _layer(
    component: str,
    path: str,
    names: dict[str, str],
    told: tuple[Mapping[str, Tensor], Mapping[str, Any], AdapterContents],
) -> FileLayer:
    read, alphas, contents = told
    parts = {part: read[name] for part, name in names.items()}
    if not parts.keys() & {"lora_A.weight", "lora_B.weight"}:
        # Diffusers has put its alpha into the first factor.
        return FileLayer(component, path, parts, names, scaling=1.0)
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in names:
            raise AdapterFileError(f"it has no {part} of the layer {component}.{path}")
    rank = read[names["lora_A.weight"]].shape[0]
    alpha = _alpha(names["lora_A.weight"], alphas)
    scaling = contents.scaling(component, path, rank, alpha)
    return FileLayer(component, path, parts, names, scaling)


def _alpha(name: str, alphas: Mapping[str, Any]) -> float | None:
    """A layer's alpha, by the name of its first factor."""
    names = (f"{name}.alpha", *(f"{name.split(end)[0]}.alpha" for end in (".lora.", ".lora_A.")))
    return next((float(alphas[known]) for known in names if known in alphas), None)


def _settle(adapter: str, layer: FileLayer, module: nn.Module) -> bool:
    """Compare one layer, and set its scaling; whether it was another."""
    loaded: Any = module.get_submodule(layer.path)
    place = f"layer {layer.component}.{layer.path}"
    if not isinstance(loaded, BaseTunerLayer):
        raise AdapterFileError(f"the {place} was not loaded")
    for part, tensor in layer.parts.items():
        other = _loaded_part(loaded, part, adapter)
        if other is None or not torch.equal(other, tensor.to(other.device, other.dtype)):
            raise AdapterFileError(f"the {part} of the {place} is not as the file has it")
        if not bool(is_finite(other)):
            raise AdapterFileError(f"the {part} of the {place} is too large for {other.dtype}")
    if abs(loaded.scaling[adapter] - layer.scaling) <= SCALING_TOLERANCE * abs(layer.scaling):
        return False
    # By its alpha, from which PEFT works out any other scale.
    alphas = loaded.alpha if layer.is_lokr else loaded.lora_alpha
    alphas[adapter] *= layer.scaling / loaded.scaling[adapter]
    loaded.set_scale(adapter, 1.0)
    return True


def _loaded_part(loaded: Any, part: str, adapter: str) -> Tensor | None:
    factor, _, kind = part.partition(".")
    factors = getattr(loaded, factor)
    if adapter not in factors:
        return None
    # A magnitude is in a module that knows the weight that it is of.
    is_module = isinstance(factors[adapter], nn.Module)
    found: Tensor = getattr(factors[adapter], kind or "weight") if is_module else factors[adapter]
    return found


def _file_strengths(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """By what each layer of the file is called there."""
    pairs: dict[str, dict[str, Tensor]] = {}
    kroneckers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part.startswith("lokr_"):
            kroneckers.setdefault(layer, {})[part] = tensor
        factor = FACTOR.search(name)
        if factor is not None:
            side = "A" if factor[2] in ("A", "down") else "B"
            pairs.setdefault(name[: factor.start()].rstrip("._"), {})[side] = tensor
    _check_alphas(tensors, [*pairs, *kroneckers])
    lokr = {
        layer: _lokr_strength(parts) * _lokr_scaling(tensors.get(f"{layer}.alpha"), parts) ** 2
        for layer, parts in kroneckers.items()
    }
    return lokr | {
        layer: _strength(pair["A"], pair["B"], _file_scaling(tensors, layer, pair["A"].shape[0]))
        for layer, pair in pairs.items()
    }


def _check_alphas(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> None:
    known = {f"{layer}.alpha" for layer in layers}
    for name in tensors:
        if name.endswith(".alpha") and name not in known:
            raise AdapterFileError(f"its {name!r} belongs to none of its layers")


def _file_scaling(tensors: Mapping[str, Tensor], layer: str, rank: int) -> float:
    alpha = tensors.get(f"{layer}.alpha")
    return 1.0 if alpha is None else float(alpha) / rank


def _strength(first: Tensor, second: Tensor, scaling: float) -> float:
    """Sum of the squares of what two factors make of an input that is drawn by its width."""
    rows = first.flatten(1).float()
    made = second.flatten(1).float() @ (rows @ _drawn(rows.shape[1]))
    return float(made.square().sum()) * scaling**2


@lru_cache
def _drawn(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


def _lokr_strength(parts: Mapping[str, Tensor]) -> float:
    """The squared Frobenius norm of a Kronecker product is the product of those of its factors."""
    strength = 1.0
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in parts:
            whole = parts[factor].double()
        else:
            whole = parts[f"{factor}_a"].double() @ parts[f"{factor}_b"].double()
        strength *= float(whole.square().sum())
    return strength


def _lokr_scaling(alpha: Tensor | None, parts: Mapping[str, Tensor]) -> float:
    """LyCORIS scales only where a factor is a product itself."""
    ranks = [parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    return 1.0 if alpha is None or not ranks else float(alpha) / ranks[0]


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= STRENGTH_TOLERANCE * max(abs(one), abs(other))
