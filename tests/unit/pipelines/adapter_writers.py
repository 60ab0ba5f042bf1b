"""LoRA files in the layouts that trainers write, and what each should add to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]
"""By the path of a layer in its component: the first factor and the second."""
Alpha = Callable[[str, int], float]
"""By the path of a layer and its rank."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA_NAMES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


def layers_of(module: nn.Module, *ends: str) -> list[str]:
    return [
        name
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear | nn.Conv2d) and name.endswith(ends)
    ]


def make_factors(
    module: nn.Module,
    ends: tuple[str, ...],
    seed: int = 1,
    ranks: Sequence[int] = (2, 4, 4),
    strength: float = 0.25,
) -> Factors:
    """Random factors; layers have these ranks in turn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * strength

    made: Factors = {}
    for index, name in enumerate(layers_of(module, *ends)):
        layer: Any = module.get_submodule(name)
        rank = ranks[index % len(ranks)]
        if isinstance(layer, nn.Conv2d):
            first = normal(rank, layer.in_channels, *layer.kernel_size)
            made[name] = first, normal(layer.out_channels, rank, 1, 1)
        else:
            made[name] = normal(rank, layer.in_features), normal(layer.out_features, rank)
    return made


def alpha_of_its_own(path: str, rank: int) -> float:
    """None is the most frequent one by far, and none is the rank."""
    return 1.0 + sum(path.encode()) % 7


def kohya(
    parts: Mapping[str, Factors], alpha: Alpha | None = alpha_of_its_own, sgm: bool = False
) -> dict[str, Tensor]:
    """As kohya's scripts write them; `sgm` with SDXL's own names of blocks."""
    tensors: dict[str, Tensor] = {}
    for component, factors in parts.items():
        for path, (first, second) in factors.items():
            known = f"text_model.{path}" if component.startswith("text_encoder") else path
            known = _sgm_path(known) if sgm and component == "unet" else known
            key = f"{KOHYA_NAMES[component]}_{known.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = first
            tensors[f"{key}.lora_up.weight"] = second
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha(path, first.shape[0]))
    return tensors


def peft_saved(factors: Factors) -> dict[str, Tensor]:
    """As PEFT's `save_pretrained` writes one component."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def diffusers_saved(parts: Mapping[str, Factors]) -> dict[str, Tensor]:
    """As diffusers' training scripts write them."""
    return {
        f"{component}.{path}.lora_{side}.weight": tensor
        for component, factors in parts.items()
        for path, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def difference_by_hand(pair: tuple[Tensor, Tensor], alpha: float) -> Tensor:
    """What the pair adds to the weight of its layer."""
    first, second = pair
    product = second.flatten(1) @ first.flatten(1)
    return (product * (alpha / first.shape[0])).reshape(second.shape[0], *first.shape[1:])


def _sgm_path(path: str, layers: int = 1) -> str:
    parts = path.split(".")
    if parts[0] == "mid_block":
        return ".".join(["middle_block", "1", *parts[3:]])
    number = (layers + 1) * int(parts[1]) + int(parts[3]) + (parts[0] == "down_blocks")
    block = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
    return ".".join([block, str(number), "1", *parts[4:]])
