"""What an adapter's file says: its tensors, and what each layer's scaling is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stepserve.pipelines.adapters.files import PEFT_CONFIG, AdapterFile, AdapterFileError
from stepserve.pipelines.loading.weights import is_finite

PEFT_PREFIX = "base_model.model."
METADATA = "lora_adapter_metadata"
# A name that is a path into a module and nothing else, but for PEFT's or ComfyUI's prefix: no
# component, no trainer's own spelling.
_BARE = re.compile(
    r"(?:base_model\.model\.)?(?:diffusion_model\.)?"
    r"(?P<path>.+)\.(?:lora_(?P<factor>A|B|down|up)(?:\.default)?\.(?P<kind>weight|bias)|alpha)"
)
_FACTORS = {"A": "A", "B": "B", "down": "A", "up": "B"}


@dataclass(frozen=True)
class AdapterContents:
    """A file that was read.

    Args:
        tensors: in a layout that diffusers reads; by the file's own names unless `is_renamed`.
        config: arguments of PEFT's `LoraConfig`, each name beginning with its component and a dot;
            None where the tensors say all there is.
        is_renamed: whether the file's layout is one that diffusers does not read by itself.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    is_renamed: bool = False

    def scaling(self, component: str, path: str, rank: int, alpha: float | None) -> float:
        """What the product of a layer's factors is multiplied with at a scale of 1.

        Args:
            component: the component that the layer is in.
            path: of the layer in there.
            rank: of its factors.
            alpha: what the tensors say; None where they say nothing.
        """
        config = self._config_of(component)
        if not config:
            return (rank if alpha is None else alpha) / rank
        patterns = config.get("alpha_pattern") or {}
        own = patterns.get(get_pattern_key(list(patterns), path), config.get("lora_alpha", 8))
        return float(own) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _config_of(self, component: str) -> dict[str, Any]:
        begin = f"{component}."
        given = self.config or {}
        return {n.removeprefix(begin): v for n, v in given.items() if n.startswith(begin)}


def read_contents(file: AdapterFile, components: Mapping[str, nn.Module]) -> AdapterContents:
    """Read a file whose header was checked.

    Raises:
        AdapterFileError: a tensor holds a number that is none, or its layout lacks what it needs.
    """
    tensors = load_file(file.path)
    _check_finite(tensors)
    with safe_open(file.path, framework="pt") as opened:
        said = (opened.metadata() or {}).get(METADATA)
    contents = _in_diffusers_layout(tensors, components, file.path.with_name(PEFT_CONFIG))
    if contents is not None:
        return contents
    return AdapterContents(tensors, None if said is None else json.loads(said))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(is_finite(tensor)):
            raise AdapterFileError(f"its tensor {name!r} holds numbers that are NaN or infinite")


def _in_diffusers_layout(
    tensors: Mapping[str, Tensor], components: Mapping[str, nn.Module], config_path: Path
) -> AdapterContents | None:
    """Bare paths, or with PEFT's or ComfyUI's prefix, under the name of their component."""
    found = {name: _BARE.fullmatch(name) for name in tensors}
    matches = {name: match for name, match in found.items() if match is not None}
    if len(matches) < len(tensors):
        return None
    paths = {match["path"] for match in matches.values()}
    component = next((n for n, m in components.items() if _has_most(m, paths)), None)
    if component is None:
        return None
    renamed, alphas = dict[str, Tensor](), dict[str, float]()
    for name, match in matches.items():
        path = module_path(components[component], match["path"]) or match["path"]
        if match["factor"] is None:
            alphas[path] = float(tensors[name])
        else:
            factor = f"lora_{_FACTORS[match['factor']]}.{match['kind']}"
            renamed[f"{component}.{path}.{factor}"] = tensors[name]
    is_peft = any(name.startswith(PEFT_PREFIX) for name in tensors)
    own = _read_peft_config(config_path) if is_peft else {}
    config = _layer_config(component, renamed, alphas, own)
    return AdapterContents(renamed, config, is_renamed=True)


def _has_most(module: nn.Module, paths: set[str]) -> bool:
    """Whether they are its layers; a wrong path is reported later, by its name."""
    return 2 * sum(module_path(module, path) is not None for path in paths) > len(paths)


def module_path(module: nn.Module, path: str) -> str | None:
    """A layer's path as the module has it, or None if it has no such layer.

    Recent versions of transformers have flattened CLIP; older files know it as it was.
    """
    for candidate in (path, path.removeprefix("text_model.")):
        try:
            module.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _read_peft_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise AdapterFileError(
            f"it is in PEFT's own layout ({PEFT_PREFIX}*), whose alpha is in {PEFT_CONFIG}, and "
            "there is none beside it; name the folder that holds both"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else kind
        raise AdapterFileError(f"{PEFT_CONFIG} says that it is a {kind} adapter, not a plain LoRA")
    return config


def _layer_config(
    component: str,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    peft_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `LoraConfig` in which every layer has its rank and alpha by its whole path."""
    end, begin = ".lora_B.weight", f"{component}."
    ranks = {n.removeprefix(begin)[: -len(end)]: t.shape[1] for n, t in tensors.items() if end in n}
    patterns = peft_config.get("alpha_pattern") or {}
    general = peft_config.get("lora_alpha")
    own = {p: patterns.get(get_pattern_key(list(patterns), p), general) for p in ranks}
    known = {p: alphas.get(p, own[p]) for p in ranks}
    rank = max(ranks.values(), default=1)
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{re.escape(p)}": n for p, n in ranks.items()},
        "alpha_pattern": {
            f"^{re.escape(p)}": ranks[p] if alpha is None else alpha for p, alpha in known.items()
        },
        "target_modules": sorted(ranks),
        "use_rslora": bool(peft_config.get("use_rslora")),
        "lora_bias": any(n.endswith(".lora_B.bias") for n in tensors),
    }
    return {begin + name: value for name, value in config.items()}
