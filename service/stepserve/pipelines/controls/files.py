"""Where networks that steer are found, and what their settings say before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepserve.domain.models import ControlKind
from stepserve.pipelines.controls.kinds import NetworkKind, kinds_over
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.facts.trust import SAFE

CONFIG = "config.json"
MODES: Mapping[str, Mapping[str, int]] = {
    "ControlNetUnionModel": {
        "openpose": 0,
        "depth": 1,
        "scribble": 2,
        "canny": 3,
        "normal": 4,
        "segment": 5,
        "tile": 6,
        "repaint": 7,
    },
    "FluxControlNetModel": {
        "canny": 0,
        "tile": 1,
        "depth": 2,
        "blur": 3,
        "pose": 4,
        "gray": 5,
        "low_quality": 6,
    },
}
"""What the authors of union networks call their modes."""


class ControlFileError(Exception):
    """A network cannot be used; the message says why, without a path."""


@dataclass(frozen=True)
class ControlSource:
    """One control as an operator lists it.

    Args:
        folder: of diffusers, with a `config.json` and weights.
        preprocessor: of requests that say none; empty: none.
        mode: of a union network, by name or number; None: it is none.
    """

    folder: Path
    preprocessor: str = ""
    mode: str | int | None = None


@dataclass(frozen=True)
class ControlOptions:
    """The controls of a model, and how many stay loaded.

    Args:
        named: by name.
        max_loaded: networks that stay loaded while no request in flight uses them, and most
            controls of one request.
        pickle: whether weights are read from pickle files where there are no safetensors.
    """

    named: Mapping[str, ControlSource] = field(default_factory=dict)
    max_loaded: int = 4
    pickle: bool = False


@dataclass(frozen=True)
class NetworkFile:
    """One version of a network: a folder whose weights were replaced is another network."""

    folder: Path
    modified_ns: int


@dataclass(frozen=True)
class FoundControl:
    """A control whose settings fit the model.

    Args:
        name: by which requests name it.
        mode: of a union network; None: it has none.
    """

    name: str
    file: NetworkFile
    kind: NetworkKind
    mode: int | None = None

    @property
    def told_kind(self) -> ControlKind:
        """What requests are told that it is."""
        return self.kind.kind if self.mode is None else ControlKind.UNION


def find_control(name: str, source: ControlSource, pipeline: Any, pickle: bool) -> FoundControl:
    """The control of that name as it is now, from its settings and the headers of its files.

    Raises:
        ControlFileError: it is not there, is something else, or was made for another model.
    """
    folder = source.folder.expanduser()
    if not folder.exists():
        raise ControlFileError("its folder does not exist")
    try:
        config = json.loads((folder / CONFIG).read_text())
        modified_ns = max(path.stat().st_mtime_ns for path in folder.iterdir())
    except OSError as error:
        raise ControlFileError(f"its folder holds no {CONFIG} that can be read") from error
    except ValueError as error:
        raise ControlFileError(f"its {CONFIG} is no valid JSON") from error
    kind = _kind_of(config, pipeline)
    _check_fits(config, kind, pipeline)
    if not pickle:
        _check_weights(folder)
    return FoundControl(name, NetworkFile(folder, modified_ns), kind, _mode(config, source))


def _kind_of(config: Mapping[str, Any], pipeline: Any) -> NetworkKind:
    network = str(config.get("_class_name", "")) or "network of no known class"
    kinds = list(kinds_over(pipeline))
    kind = next((kind for kind in kinds if kind.network == network), None)
    if kind is None:
        taken = ", ".join(kind.network for kind in kinds) or "none"
        raise ControlFileError(f"it is a {network}, and a {type(pipeline).__name__} takes: {taken}")
    return kind


def _check_fits(config: Mapping[str, Any], kind: NetworkKind, pipeline: Any) -> None:
    """Compare what a network and the denoiser that it was made for have in common."""
    denoiser = denoiser_of(pipeline).config
    if kind.kind is ControlKind.T2I_ADAPTER:
        wanted, own = config.get("channels", [])[:1], list(denoiser["block_out_channels"])[:1]
        _check_equal("channels", wanted, own)
        return
    for name in kind.settings:
        wanted, own = config.get(name), denoiser.get(name)
        # A UNet made for inpainting has more inputs, and its ControlNet has not.
        if None not in (wanted, own) and name != "in_channels":
            _check_equal(name, wanted, own)


def _check_equal(name: str, of_network: Any, of_denoiser: Any) -> None:
    if json.dumps(of_network) != json.dumps(of_denoiser):
        raise ControlFileError(
            f"it was made for another model: its {name} is {json.dumps(of_network)}, and this "
            f"model's is {json.dumps(of_denoiser)}"
        )


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob(f"*{SAFE}"))
    if not files:
        raise ControlFileError(
            f"its folder holds no {SAFE} files, and others may run code when they are read"
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ControlFileError(f"{file.name} is not a whole safetensors file") from error


def _mode(config: Mapping[str, Any], source: ControlSource) -> int | None:
    """The number of a union network's mode."""
    network = str(config["_class_name"])
    count = config.get("num_control_type") or config.get("num_mode")
    if not count:
        if source.mode is not None:
            raise ControlFileError(f"mode {source.mode!r} is of no use: it is no union network")
        return None
    names = {name: number for name, number in MODES[network].items() if number < count}
    mode = names.get(source.mode, source.mode) if isinstance(source.mode, str) else source.mode
    if not isinstance(mode, int) or not 0 <= mode < count:
        raise ControlFileError(
            f"it is a union network: its mode must be 0 to {count - 1} or one of "
            f"{', '.join(names)}, and is {source.mode!r}"
        )
    return mode
