"""LoRA adapters of one resident pipeline: loaded when asked for, and applied where wanted."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from stepserve.domain.checks.limits import check_adapter_names
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import GenerationFailedError, InvalidRequestError
from stepserve.domain.models import AdapterSharing
from stepserve.domain.requests import AdapterUse
from stepserve.engine.calls.call import Enter, VariantRows
from stepserve.pipelines.adapters.checks import (
    FileLayer,
    check_loaded,
    check_strengths,
    for_text_encoders,
    layers_of,
)
from stepserve.pipelines.adapters.contents import AdapterContents, read_contents
from stepserve.pipelines.adapters.files import (
    INSTEAD,
    AdapterFile,
    AdapterFileError,
    AdapterOptions,
    check_header,
)
from stepserve.pipelines.adapters.layers import check_complete, check_fits, settle_layers
from stepserve.pipelines.adapters.mixing import NOT_MIXED, RowLayers, obstacle
from stepserve.pipelines.adapters.module import ModuleAdapters
from stepserve.pipelines.adapters.rows import Slot, Slots
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.library_messages import heard_libraries

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class AppliedAdapter:
    """One adapter of a variant."""

    file: AdapterFile
    scale: float


Variant = tuple[AppliedAdapter, ...] | None
"""What the modules are set to for a request, sorted by name; None without adapters."""


class AdapterCache:
    """Keeps adapters loaded on the modules of one pipeline, and applies them to rows of forwards.

    `resolve`, `names`, `sharing`, `separate`, `can_mix` and `memory_bytes` may be called from any
    thread; all else belongs to the engine's. An adapter is never unloaded while a request in flight
    uses it: while those use more than `max_loaded` different ones, more are loaded. Without any
    adapter nothing is ever touched.

    Raises:
        ModelLoadError: there are adapters, and the pipeline takes none.
    """

    def __init__(self, pipeline: Any, options: AdapterOptions) -> None:
        self.options = options
        self._pipeline = pipeline
        self._components = _components(pipeline) if options.any else {}
        self._modules = {name: ModuleAdapters(m) for name, m in self._components.items()}
        self._row_layers: RowLayers = {}
        # By adapter that was loaded once, why it is not mixed with others; empty if it is.
        self._obstacles: dict[AdapterFile, str] = {}
        # Least recently used first, with the name that PEFT knows it by: file names may hold dots.
        self._loaded: OrderedDict[AdapterFile, str] = OrderedDict()
        self._users: Counter[AdapterFile] = Counter()
        self._numbers = itertools.count()
        self._touched = False
        # By name, what was last found out of its file, so that it is found out once.
        self._sound: dict[str, AdapterFile] = {}
        self._broken: dict[str, tuple[AdapterFile, str]] = {}

    @property
    def max_per_request(self) -> int:
        """Most adapters of one request; 0 if the model takes none."""
        return self.options.max_loaded if self._components else 0

    def names(self) -> tuple[str, ...]:
        """Every adapter that a request may name at this moment."""
        return self.options.names() if self._components else ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the loaded adapters, least recently used first."""
        return tuple(file.name for file in self._loaded)

    def resolve(self, uses: Sequence[AdapterUse]) -> Variant:
        """What the modules are to be set to for a request. Reads headers of new files only.

        Raises:
            InvalidRequestError: an adapter is not known, or its file cannot be used.
        """
        if not uses:
            return None
        check_adapter_names(uses, self.names())
        by_name = sorted(uses, key=lambda use: use.name)
        return tuple(AppliedAdapter(self._sound_file(use.name), use.scale) for use in by_name)

    def mix(self, row_layers: RowLayers) -> None:
        """Let rows of one forward have different adapters, where these layers are all they change.

        Call it before the first is loaded. Else a forward has one variant for all of its rows.
        """
        self._row_layers = {n: row_layers[n] for n in row_layers.keys() & self._components.keys()}

    def can_mix(self, variant: Variant) -> bool:
        """Whether forwards may have rows of this variant and others of which this holds as well.

        Of an adapter that was not loaded yet it is expected.
        """
        is_any = bool(self._row_layers)
        return is_any and not any(self._obstacles.get(used.file) for used in variant or ())

    def sharing(self) -> tuple[AdapterSharing, ...]:
        """Of each adapter, whether forwards have others besides, as far as it is known."""
        is_any = bool(self._row_layers)
        known = self._reasons() if is_any else dict.fromkeys(self.names(), NOT_MIXED)
        return tuple(
            AdapterSharing(name, not known[name], known[name])
            if name in known
            else AdapterSharing(name)
            for name in self.names()
        )

    def separate(self) -> tuple[str, ...]:
        """Names of those that were loaded and cannot be mixed, where others may."""
        return tuple(name for name, reason in self._reasons().items() if reason)

    def stacked_bytes(self) -> int:
        """Memory of the factors that are stacked for the rows of forwards."""
        return sum(module.stacked_bytes for module in self._modules.values())

    def memory_bytes(self) -> int:
        """About what adapters take: files of those that are loaded, and what is stacked of them."""
        return sum(file.size_bytes for file in list(self._loaded)) + self.stacked_bytes()

    def enter(self) -> dict[str, Enter]:
        """By component, what is told which variant each row of its next forward wants."""
        return {name: partial(self._enter, name) for name in self._components}

    def run_with(self, variant: Variant, run: Callable[[], T]) -> T:
        """Run a pipeline call while the adapters of `variant` are loaded.

        Raises:
            InvalidRequestError: an adapter cannot be loaded.
        """
        if variant is None:
            return run()
        with self._holding([applied.file for applied in variant]):
            return run()

    def close(self) -> None:
        """Take the modules back to what they were. The engine must have ended."""
        if self._touched:
            self._loaded.clear()
            self._pipeline.unload_lora_weights()
            self._refresh()

    def _reasons(self) -> dict[str, str]:
        """By name, why an adapter that was loaded is not mixed; empty if it is."""
        # Of several files of one name the last one counts.
        return {file.name: reason for file, reason in self._obstacles.copy().items()}

    def _enter(self, name: str, rows: Sequence[VariantRows]) -> None:
        wanted: list[tuple[Any, int]] = [*rows]
        if name in self._row_layers and all(self.can_mix(variant) for variant, _ in wanted):
            self._modules[name].apply_by_row([(self._slots(v), count) for v, count in wanted])
        else:
            (variant,) = {variant for variant, _ in wanted}
            self._modules[name].apply(self._slots(variant))

    def _slots(self, variant: Variant) -> Slots:
        return tuple(Slot(self._loaded[used.file], used.scale) for used in variant or ())

    @contextmanager
    def _holding(self, files: Sequence[AdapterFile]) -> Iterator[None]:
        # All are held before the first is loaded, so that loading one does not unload another.
        self._users.update(files)
        try:
            for file in files:
                self._ensure_loaded(file)
            yield
        finally:
            self._users -= Counter(files)
            self._make_room(0)

    def _ensure_loaded(self, file: AdapterFile) -> None:
        if file not in self._loaded:
            self._make_room(1)
            self._loaded[file] = self._load(file)
        self._loaded.move_to_end(file)

    def _make_room(self, room: int) -> None:
        """Unload the least recently used adapters that are idle, down to the limit."""
        idle = [file for file in self._loaded if file not in self._users]
        surplus = len(self._loaded) + room - self.options.max_loaded
        for file in idle[: max(surplus, 0)]:
            self._unload(self._loaded.pop(file))
            logger.info("adapter %s is unloaded", file.name)

    def _sound_file(self, name: str) -> AdapterFile:
        try:
            file = self.options.find(name)
            if self._sound.get(name) != file:
                check_header(file)
                self._sound[name] = file
        except AdapterFileError as error:
            raise _unusable(name, str(error)) from error
        broken, reason = self._broken.get(name, (None, ""))
        if broken == file:
            raise _unusable(name, reason)
        return file

    def _load(self, file: AdapterFile) -> str:
        name = f"adapter{next(self._numbers):06}"
        try:
            self._load_as(name, file)
        except Exception as error:
            self._unload(name)
            raise self._remember_failure(file, error) from error
        apart = self._obstacles[file]
        logger.info("adapter %s is loaded, and %s", file.name, apart or "shares forwards")
        return name

    def _load_as(self, name: str, file: AdapterFile) -> None:
        contents = read_contents(file, self._components)
        loader, reading = self._checking_loader(contents)
        self._touched = True
        with heard_libraries() as heard:
            loader.load_lora_weights(
                # Diffusers takes tensors out of what it is given.
                dict(contents.tensors) if contents.is_renamed else str(file.path.parent),
                weight_name=file.path.name,
                adapter_name=name,
                local_files_only=True,
                use_safetensors=True,
            )
        check_complete(name, reading.tensors, self._components)
        mended = check_loaded(name, reading.layers, self._components)
        logger.info("adapter %s: scalings mended: %d; remarks: %s", file.name, mended, heard)
        for module in self._components.values():
            settle_layers(module)
        self._refresh()
        reason = obstacle(name, reading.layers, self._components, self._row_layers)
        self._obstacles[file] = reason
        if self.options.find(file.name) != file:
            raise _ReplacedError

    def _checking_loader(self, contents: AdapterContents) -> tuple[Any, _Reading]:
        """A pipeline that looks at what it read, brought into one form, before it loads that.

        What it read is put into the second return value.
        """
        loader, reading = copy.copy(self._pipeline), _Reading()

        def read_and_check(*args: Any, **kwargs: Any) -> Any:
            read = self._pipeline.lora_state_dict(*args, **kwargs)
            tensors, *others = read if isinstance(read, tuple) else (read,)
            alphas: dict[str, Any] = next((o for o in others[:-1] if o), {})
            reading.layers = layers_of(tensors, alphas, contents, self._components)
            check_fits(reading.layers, self._components)
            check_strengths(contents, reading.layers)
            tensors = for_text_encoders(tensors, reading.layers, self._components)
            reading.tensors = tensors
            config = None if contents.config is None else dict(contents.config)
            # Last comes the configuration, where there is one.
            return (tensors, *others[:-1], config) if others else tensors

        vars(loader)["lora_state_dict"] = read_and_check
        return loader, reading

    def _remember_failure(self, file: AdapterFile, error: Exception) -> Exception:
        # Where the file is at fault, the message says all there is.
        trace = None if isinstance(error, AdapterFileError) else error
        logger.warning("adapter %s cannot be loaded: %s", file.name, error, exc_info=trace)
        if isinstance(error, _ReplacedError):
            return _unusable(file.name, "its file was replaced meanwhile; send the request again")
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return GenerationFailedError(f"no memory for adapter {file.name}")
        reason = str(error).replace(f"{file.path.parent}/", "")
        if "lokr" in reason.lower():
            reason = f"it is a LoKr adapter (LyCORIS) of a layout that this model lacks: {INSTEAD}"
        elif not isinstance(error, AdapterFileError):
            # What libraries say is in the log.
            reason = "it does not fit this model; the server's log says more"
        self._broken[file.name] = file, reason
        return _unusable(file.name, reason)

    def _unload(self, name: str) -> None:
        # PEFT warns of deleting what is active.
        self._refresh()
        self._pipeline.delete_adapters([name])
        self._refresh()

    def _refresh(self) -> None:
        for module in self._modules.values():
            module.refresh()


@dataclass
class _Reading:
    """What diffusers made of a file."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[FileLayer] = field(default_factory=list)


class _ReplacedError(Exception):
    """The file that was read is not the one that was asked for."""


def _components(pipeline: Any) -> dict[str, torch.nn.Module]:
    names = getattr(pipeline, "_lora_loadable_modules", ())
    found = {name: getattr(pipeline, name, None) for name in names}
    components = {name: module for name, module in found.items() if module is not None}
    if not components:
        raise ModelLoadError(f"diffusers loads no adapters into a {type(pipeline).__name__}")
    # To load one, diffusers would take the hooks off and put new ones on, below our feet.
    if any(hasattr(module, "_hf_hook") for module in components.values()):
        raise ModelLoadError("adapters cannot be used together with CPU offload")
    return components


def _unusable(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"adapters: {shown(name)} cannot be used: {reason}", "adapters")
