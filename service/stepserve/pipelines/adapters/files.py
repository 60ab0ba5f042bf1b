"""Where LoRA adapters are found, and what a file's header says before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

SUFFIX = ".safetensors"
WEIGHTS = f"pytorch_lora_weights{SUFFIX}"
# How the tensors of adapters are called by diffusers, PEFT and Kohya's trainer.
FACTOR = re.compile(r"(lora\w*[._])(A|B|down|up)((\.\w+)?\.weight)$")
_OTHER = re.compile(
    r"(lora\w*[._](B|up)(\.\w+)?\.bias|\.lokr_\w+|\.lora_magnitude_vector|\.alpha)$"
)
# What else people keep under the name of adapters, by what the tensors of it are called.
_OTHER_KINDS = {
    # Diffusers leaves these out, and reads those that it saved itself.
    "a DoRA adapter of kohya's or LyCORIS": r"\.dora_scale$",
    "a LoHa adapter (LyCORIS)": r"\.hada_w|\.hada_t",
    "a LoCon adapter with core tensors (LyCORIS, Tucker decomposition)": r"\.lora_mid\.",
    "a GLoRA adapter (LyCORIS)": r"\.[ab][12]\.weight$",
    "an OFT adapter": r"\.oft_(blocks|diag|r)\b|\.oft_",
    "an (IA)3 adapter": r"\.on_input$|\.ia3_",
    "whole differences of weights (LyCORIS)": r"\.diff(_b)?$",
    "a textual inversion embedding": r"^(emb_params|clip_[gl]|string_to_param|t5xxl)\b",
    "an IP-Adapter": r"^(ip_adapter|image_proj)\.",
    "a ControlNet": r"^(control_model|controlnet|input_hint_block)\.|^lora_controlnet$",
    "a whole checkpoint": r"^(model\.diffusion|first_stage|cond_stage)_model\.(?!.*lora)",
}
INSTEAD = (
    "only LoRA adapters are loaded; convert it to a LoRA, or merge it into the model's weights and "
    "serve those as a model of their own"
)
PEFT_CONFIG = "adapter_config.json"
_PARTNER = {"A": "B", "B": "A", "down": "up", "up": "down"}


class AdapterFileError(Exception):
    """An adapter cannot be used; the message says why, without a path."""


@dataclass(frozen=True)
class AdapterFile:
    """One version of an adapter: a file that was replaced is another adapter."""

    name: str
    path: Path
    modified_ns: int
    size_bytes: int


@dataclass(frozen=True)
class AdapterOptions:
    """Where the adapters of a model are found, and how many stay loaded.

    Args:
        named: adapters by name: a safetensors file, or a folder that holds one.
        folder: each safetensors file in it is an adapter named like the file, and so is each folder
            with an `adapter_config.json`, as PEFT saves it. It is looked through whenever an
            adapter is asked for, so new files are found while serving.
        max_loaded: adapters that stay loaded while no request in flight uses them.
    """

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    max_loaded: int = 4

    @property
    def any(self) -> bool:
        """Whether there is a place where adapters could be."""
        return bool(self.named) or self.folder is not None

    def names(self) -> tuple[str, ...]:
        """Every adapter there is at this moment, sorted."""
        return tuple(sorted({*self.named, *self._in_folder()}))

    def find(self, name: str) -> AdapterFile:
        """The adapter of that name as it is now.

        Raises:
            AdapterFileError: there is no such file.
        """
        path = self.named[name] if name in self.named else self._in_folder().get(name)
        if path is None:
            raise AdapterFileError("there is no such file")
        try:
            path = _weights_file(path.expanduser())
            stat = path.stat()
        except OSError as error:
            raise AdapterFileError(error.strerror or "it cannot be read") from error
        return AdapterFile(name, path, max(stat.st_mtime_ns, _config_ns(path)), stat.st_size)

    def _in_folder(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        folder = self.folder.expanduser()
        # PEFT saves a folder for each.
        folders = {path.parent.name: path.parent for path in folder.glob(f"*/{PEFT_CONFIG}")}
        return folders | {path.stem: path for path in folder.glob(f"*{SUFFIX}")}


def _config_ns(path: Path) -> int:
    """When the settings that PEFT saves beside the weights were changed, or 0 without any."""
    config = path.with_name(PEFT_CONFIG)
    return config.stat().st_mtime_ns if config.exists() else 0


def check_header(file: AdapterFile) -> None:
    """Refuse what is no adapter, from the file's header alone.

    Raises:
        AdapterFileError: the file is cut short, is no safetensors file, or holds something else.
    """
    try:
        with safe_open(file.path, framework="numpy") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"it is not a whole safetensors file ({error})") from error
    _check_tensor_names(names)


def _check_tensor_names(names: Collection[str]) -> None:
    if not names:
        raise AdapterFileError("it holds no tensors")
    _check_kind(names)
    factors = {name: FACTOR.search(name) for name in sorted(names)}
    for name, factor in factors.items():
        # Anything else would be ignored, or replace weights of the model for every request.
        if factor is None and not _OTHER.search(name):
            raise AdapterFileError(f"its tensor {name!r} is none of a LoRA adapter")
    for name, factor in factors.items():
        # Without it, diffusers would leave memory as it was found in its place.
        if factor is None:
            continue
        other = f"{name[: factor.start()]}{factor[1]}{_PARTNER[factor[2]]}{factor[3]}"
        if other not in names:
            raise AdapterFileError(f"it lacks the other factor of {name!r}")


def _check_kind(names: Collection[str]) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in names):
            raise AdapterFileError(f"it is {kind}: {INSTEAD}")


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != SUFFIX:
            raise AdapterFileError(f"only {SUFFIX} files are loaded")
        return path
    files = sorted(path.glob(f"*{SUFFIX}"))
    if path / WEIGHTS in files:
        return path / WEIGHTS
    if len(files) != 1:
        raise AdapterFileError(f"its folder holds {len(files)} {SUFFIX} files and no {WEIGHTS}")
    return files[0]
