"""Where the weights of IP-Adapters lie, and what a file's header says before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.trust import PICKLES, SAFE

# How the tensors are called: those of h94's files, and of XLabs' for FLUX.
_PROJECTION = re.compile(r"^(image_proj|ip_adapter_proj_model)\.")
_LAYER = re.compile(
    r"^(?:ip_adapter|double_blocks)\.(\d+)\.(?:processor\.)?"
    r"(?:to_k_ip|ip_adapter_double_stream_k_proj)\.weight$"
)
_FACES = re.compile(r"^ip_adapter\.\d+\.to_\w+_lora\.|^image_proj\.perceiver_resampler\.")
_FACE_PROJECTION = frozenset({"image_proj.proj.0.weight", "image_proj.norm.weight"})


@dataclass(frozen=True)
class IpAdapterFiles:
    """One IP-Adapter as an operator lists it.

    Args:
        name: by which requests name it.
        weights: a file.
        image_encoder: folder of a CLIP (of Stable Diffusion 3 a SigLIP) vision model, for pipelines
            that come without one.
    """

    name: str
    weights: Path
    image_encoder: Path


def files_of(adapters: Sequence[IpAdapterFiles]) -> list[Path]:
    """Every file that decides what adapters do with a reference image."""
    encoders = (folder for adapter in adapters[:1] for folder in adapter.image_encoder.glob("*"))
    settings = sorted(file for file in encoders if file.suffix in (SAFE, ".json", *PICKLES))
    return [*(adapter.weights for adapter in adapters), *settings]


def find_weights(name: str, folder: Path, weight_name: str | None) -> Path:
    """The file of an adapter's weights.

    Args:
        name: of the adapter, for messages.
        folder: that holds it, or the file itself.
        weight_name: of the file in the folder; None where there is one safetensors file only.

    Raises:
        ModelLoadError: there is no such file, or more than one.
    """
    if folder.is_file():
        return folder
    if not folder.exists():
        raise _unusable(name, f"{folder} does not exist")
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise _unusable(name, f"its folder holds no file {weight_name}")
        return folder / weight_name
    found = sorted(folder.glob(f"*{SAFE}"))
    if len(found) != 1:
        raise _unusable(name, f"its folder holds {len(found)} {SAFE} files; set weight_name to one")
    return found[0]


def check_weights(files: IpAdapterFiles, allow_pickle: bool) -> int | None:
    """Refuse what is no IP-Adapter, from the file's header alone.

    Returns:
        For how many attention layers it has weights; None where only loading it would tell.

    Raises:
        ModelLoadError: says what it is instead.
    """
    suffix = files.weights.suffix
    if suffix != SAFE:
        if suffix not in PICKLES or not allow_pickle:
            raise _unusable(
                files.name,
                f"{files.weights.name} is no {SAFE} file, and others may run code when they are "
                "read; convert it, or, if you trust it, set allow_pickle: true for this model",
            )
        return None
    try:
        with safe_open(files.weights, framework="numpy") as opened:
            return _check_tensor_names(files.name, set(opened.keys()))
    except (SafetensorError, OSError) as error:
        reason = f"{files.weights.name} is not a whole safetensors file ({error})"
        raise _unusable(files.name, reason) from error


def _check_tensor_names(name: str, tensors: Collection[str]) -> int:
    if set(tensors) >= _FACE_PROJECTION or any(map(_FACES.search, tensors)):
        raise _unusable(
            name, "it was made for embeddings of faces (FaceID), which a request cannot send"
        )
    layers = {match[1] for tensor in tensors if (match := _LAYER.search(tensor))}
    if not layers or not any(_PROJECTION.search(tensor) for tensor in tensors):
        raise _unusable(name, "it holds no IP-Adapter: no tensors image_proj.* and ip_adapter.*")
    return len(layers)


def _unusable(name: str, reason: str) -> ModelLoadError:
    return ModelLoadError(f"ip_adapters.{name}: {reason}", f"its IP-Adapter {name} cannot be used")
