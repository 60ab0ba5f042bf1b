"""Networks that steer one resident pipeline: loaded when asked for, and evicted when idle."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import diffusers
import torch

from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import GenerationFailedError, InvalidRequestError
from stepserve.domain.models import Control, ControlKind
from stepserve.domain.requests import ControlUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.controls.files import (
    ControlFileError,
    ControlOptions,
    FoundControl,
    NetworkFile,
    find_control,
)
from stepserve.pipelines.controls.kinds import kinds_over
from stepserve.pipelines.controls.preprocessors import check_available, missing_preprocessors
from stepserve.pipelines.controls.steering import Steering, steering_pipeline
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.facts.signature import read_signature
from stepserve.pipelines.loading.library_messages import heard_libraries
from stepserve.pipelines.loading.speed import is_channels_last
from stepserve.pipelines.loading.weights import check_heard, is_finite

logger = logging.getLogger(__name__)

T = TypeVar("T")
Park = Callable[[str, torch.nn.Module], None]
"""Makes calls of a network park, under a name that no other network has."""

Controls = tuple[FoundControl, ...]


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in the memory of the model's device."""

    network: Any
    memory_bytes: int


class ControlCache:
    """Keeps networks loaded that steer one pipeline.

    `resolve` and `listed` may be called from any thread; everything else belongs to the engine's.
    A network is never dropped while a request in flight uses it: while those use more than
    `max_loaded` different ones, more are loaded.

    Args:
        pipeline: the resident one.
        options: its controls.

    Raises:
        ModelLoadError: there are controls, and the pipeline takes none.
    """

    def __init__(self, pipeline: Any, options: ControlOptions) -> None:
        self.options = options
        self._pipeline = pipeline
        kinds = list(kinds_over(pipeline))
        if options.named and not kinds:
            name = type(pipeline).__name__
            raise ModelLoadError(
                f"controls: none are served with a {name}; leave controls out of its settings"
            )
        self.tasks = {task for kind in kinds for task in kind.pipelines} if options.named else set()
        self.park: Park = lambda name, network: None
        # Least recently used first.
        self._loaded: OrderedDict[NetworkFile, LoadedNetwork] = OrderedDict()
        self._users: Counter[NetworkFile] = Counter()
        self._numbers = itertools.count(1)
        self._broken: dict[NetworkFile, str] = {}
        usual = {name: source.preprocessor for name, source in options.named.items()}
        for missing in missing_preprocessors(usual):
            logger.warning("%s", missing)

    def listed(self) -> tuple[Control, ...]:
        """Every control, and which are loaded at this moment."""
        return tuple(self._told(name) for name in sorted(self.options.named))

    def log_unusable(self) -> None:
        """Tell the operator of the controls that cannot be used as they are set."""
        for name, source in self.options.named.items():
            try:
                self._find(name)
            except InvalidRequestError as error:
                logger.warning(
                    "%s (models.*.controls.%s, path %s): requests that name it are refused until "
                    "its files are mended",
                    error,
                    name,
                    source.folder,
                )

    def memory_bytes(self) -> int:
        """Of the weights of all networks that are loaded."""
        return sum(loaded.memory_bytes for loaded in list(self._loaded.values()))

    def resolve(
        self, uses: Sequence[ControlUse], task: Task, with_references: bool = False
    ) -> Controls:
        """The controls of a request. Reads settings and headers only.

        Args:
            uses: what the request says of each.
            task: that they are for.
            with_references: whether the request has reference images as well.

        Raises:
            InvalidRequestError: one cannot be used, or not for the task, or not with the others, or
                not with reference images.
        """
        # Those of the model itself are no networks.
        named = [use for use in uses if use.name in self.options.named]
        for use in uses:
            check_available(use.preprocessor)
        controls = tuple(self._find(use.name) for use in named)
        if controls:
            _check_together(controls, task)
        if controls and with_references:
            _check_with_references(controls[0], task)
        return controls

    def run_with(self, controls: Controls, run: Callable[[], T]) -> T:
        """Run a pipeline call while these controls are loaded.

        Raises:
            InvalidRequestError: one cannot be loaded.
        """
        if not controls:
            return run()
        with self._holding(controls):
            return run()

    def steering(self, controls: Controls, task: Task) -> Steering | None:
        """How requests with these controls are called; None without any. While they are loaded."""
        if not controls:
            return None
        networks = [self._loaded[control.file].network for control in controls]
        pipeline = steering_pipeline(self._pipeline, task, controls, networks)
        return Steering(pipeline, controls, networks)

    def _told(self, name: str) -> Control:
        source = self.options.named[name]
        try:
            found = self._find(name)
        except InvalidRequestError as error:
            return Control(
                name,
                ControlKind.CONTROLNET,
                preprocessor=source.preprocessor,
                problem=str(error),
            )
        loaded = self._loaded.get(found.file)
        return Control(
            name,
            found.told_kind,
            loaded is not None,
            0 if loaded is None else loaded.memory_bytes,
            source.preprocessor,
            takes_interval=found.kind.takes_interval,
        )

    def _find(self, name: str) -> FoundControl:
        try:
            source = self.options.named[name]
            found = find_control(name, source, self._pipeline, self.options.pickle)
        except ControlFileError as error:
            raise _unusable(name, str(error)) from error
        if reason := self._broken.get(found.file):
            raise _unusable(name, reason)
        return found

    @contextmanager
    def _holding(self, controls: Controls) -> Iterator[None]:
        # All are held before the first is loaded, so that loading one does not drop another.
        files = [control.file for control in controls]
        self._users.update(files)
        try:
            for control in controls:
                self._ensure_loaded(control)
            yield
        finally:
            self._users -= Counter(files)
            self._make_room(0)

    def _ensure_loaded(self, control: FoundControl) -> None:
        if control.file not in self._loaded:
            self._make_room(1)
            self._loaded[control.file] = self._load(control)
        self._loaded.move_to_end(control.file)

    def _make_room(self, room: int) -> None:
        """Drop the least recently used networks that are idle, down to the limit."""
        idle = [file for file in self._loaded if file not in self._users]
        surplus = len(self._loaded) + room - self.options.max_loaded
        for file in idle[: max(surplus, 0)]:
            dropped = self._loaded.pop(file)
            logger.info(
                "control network %s is dropped: %d bytes", file.folder, dropped.memory_bytes
            )

    def _load(self, control: FoundControl) -> LoadedNetwork:
        try:
            network = self._read(control)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise GenerationFailedError(f"no memory for control {control.name}") from error
        except Exception as error:
            # What libraries say is in the log.
            logger.warning("control %s cannot be loaded", control.name, exc_info=error)
            reason = "its weights are not whole; the server's log says more"
            self._broken[control.file] = reason
            raise _unusable(control.name, reason) from error
        memory_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
        self.park(f"controls.{next(self._numbers)}", network)
        logger.info("control %s is loaded: %d bytes", control.name, memory_bytes)
        return LoadedNetwork(network, memory_bytes)

    def _read(self, control: FoundControl) -> Any:
        with heard_libraries() as heard:
            network = getattr(diffusers, control.kind.network).from_pretrained(
                control.file.folder,
                dtype=denoiser_of(self._pipeline).dtype,
                # None: safetensors where there are any.
                use_safetensors=None if self.options.pickle else True,
                local_files_only=True,
            )
        check_heard(heard)
        network = network.to(self._pipeline.device).eval().requires_grad_(False)
        # Or the format of what it gives, and so its bits, would follow from who shares its forward.
        if is_channels_last(denoiser_of(self._pipeline)):
            network.to(memory_format=torch.channels_last)
        if not all(bool(is_finite(p.detach())) for p in network.parameters()):
            raise ControlFileError("its weights are not finite")
        return network


def _check_together(controls: Controls, task: Task) -> None:
    first, *others = controls
    for control in controls:
        if task not in control.kind.pipelines:
            taken = ", ".join(control.kind.pipelines)
            raise InvalidRequestError(
                f"controls: {shown(control.name)} is a {control.told_kind}, with which this model "
                f"does {taken}, not {task}",
                "controls",
            )
    for control in others:
        if control.kind is not first.kind:
            raise _not_together(first, control, "are of different kinds")
        is_union = control.kind.kind is ControlKind.UNION
        if is_union and control.file != first.file:
            raise _not_together(first, control, "are different union networks")
        if not is_union and not control.kind.several:
            raise _not_together(first, control, f"are {control.kind.network}s: it takes one only")


def _check_with_references(control: FoundControl, task: Task) -> None:
    steering = getattr(diffusers, control.kind.pipelines[task])
    if not read_signature(steering).accepts("ip_adapter_image_embeds"):
        raise InvalidRequestError(
            f"references: they cannot be combined with {shown(control.name)}, a "
            f"{control.told_kind}, for {task} with this model: leave out references or controls",
            "references",
        )


def _not_together(one: FoundControl, other: FoundControl, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"controls: {shown(one.name)} and {shown(other.name)} {why}, so that they cannot be "
        "combined in one request",
        "controls",
    )


def _unusable(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"controls: {shown(name)} cannot be used: {reason}", "controls")
