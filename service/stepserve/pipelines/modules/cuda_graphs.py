"""Forwards recorded once and replayed: CUDA graphs.

Launching the thousand kernels of a forward takes Python longer than a GPU takes to run them, unless
there are many rows of large images. A CUDA graph launches all of them at once. It runs the very
kernels of eager code, so images keep their bytes; that is checked when a graph is recorded.

A graph fits arguments of one shape and lies at fixed addresses: arguments are copied in, outputs
are copied out. All graphs of a forward use the same memory one after another.

    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from enum import Enum, auto
from typing import Any, Protocol

import torch
from cachetools import LRUCache
from optree import PyTreeSpec

from stepserve.engine.calls.arguments import SIMPLE, flatten, unflatten
from stepserve.engine.calls.stacking import duplicate, tensors_in
from stepserve.engine.device_errors import is_out_of_memory
from stepserve.pipelines.modules.third_party.pinned_noise import from_pinned

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
# Of one denoiser: row counts times sizes. The one that was not used for longest goes first.
MOST_GRAPHS = 128
MOST_SHAPES = 1024


class Recording(Protocol):
    """A forward with fixed places for its arguments and its output."""

    def replay(self, leaves: Sequence[Any]) -> Any:
        """What the forward returns for these arguments; nobody else writes into it."""
        ...


Recorder = Callable[[Forward, Sequence[Any], PyTreeSpec], Recording]


class Seen(Enum):
    """What is known of a shape that has no graph."""

    ONCE = auto()
    REFUSED = auto()


class GraphedForward:
    """Stands around the forward of one module.

    The first forward of a shape is eager, as it may be the only one; the second is recorded. What
    cannot be recorded (it looks at a number on the device, say) stays eager, and so does whatever
    wants gradients or gets arguments that are more than tensors and plain values.

    Args:
        forward: of a resident module.
        record: makes a recording; may raise.
        most: recordings that are kept.
    """

    def __init__(self, forward: Forward, record: Recorder, most: int = MOST_GRAPHS) -> None:
        self._wrapped = forward
        self._record = record
        self._recordings: LRUCache[Hashable, Recording] = LRUCache(most)
        self._seen: LRUCache[Hashable, Seen] = LRUCache(MOST_SHAPES)
        functools.update_wrapper(self, forward, updated=())

    @property
    def recorded(self) -> int:
        """Shapes that are replayed."""
        return len(self._recordings)

    @property
    def refused(self) -> int:
        """Shapes that were tried and stay eager."""
        return list(self._seen.values()).count(Seen.REFUSED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the graph of this shape, or run eager code."""
        leaves, structure = flatten((args, kwargs))
        is_plain = all(isinstance(leaf, torch.Tensor) or type(leaf) in SIMPLE for leaf in leaves)
        if torch.is_grad_enabled() or not is_plain:
            return self._wrapped(*args, **kwargs)
        shape = (structure, tuple(map(_describe, leaves)))
        recording = self._recordings.get(shape)
        if recording is None and self._is_due(shape):
            recording = self._try_to_record(shape, leaves, structure)
        if recording is None:
            return self._wrapped(*args, **kwargs)
        return recording.replay(leaves)

    def _is_due(self, shape: Hashable) -> bool:
        seen = self._seen.get(shape)
        if seen is None:
            self._seen[shape] = Seen.ONCE
        return seen is Seen.ONCE

    def _try_to_record(
        self, shape: Hashable, leaves: Sequence[Any], structure: PyTreeSpec
    ) -> Recording | None:
        try:
            recording = self._record(self._wrapped, leaves, structure)
            args, kwargs = unflatten(structure, leaves)
            objection = _objection(self._wrapped(*args, **kwargs), recording.replay(leaves))
        except Exception as error:
            if is_out_of_memory(error):
                # There may be more another time.
                self._seen.pop(shape, None)
                return None
            objection = f"{type(error).__name__}: {error}".splitlines()[0]
        if objection:
            self._seen[shape] = Seen.REFUSED
            logger.info("a forward of %s stays eager: %s", shape, objection)
            return None
        if len(self._recordings) == self._recordings.maxsize:
            evicted, _ = self._recordings.popitem()
            # Else it would be recorded again the very next time.
            self._seen.pop(evicted, None)
        self._recordings[shape] = recording
        return recording


class CudaRecording:
    """One CUDA graph, with its arguments and its output.

    Args:
        forward: its kernels must have run before, so that all is loaded.
        leaves: its arguments, one after another.
        structure: of the arguments.
        pool: memory, which recordings may share.
    """

    def __init__(
        self, forward: Forward, leaves: Sequence[Any], structure: PyTreeSpec, pool: Any
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._inputs = [
            leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        args, kwargs = unflatten(structure, self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may copy images from the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = forward(*args, **kwargs)

    def replay(self, leaves: Sequence[Any]) -> Any:
        """Copy the arguments in, launch the graph, copy the output."""
        for place, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                place.copy_(from_pinned(leaf), non_blocking=True)
        self._graph.replay()
        # The next graph writes into the same memory.
        return duplicate(self._output)


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        # Strides, too: kernels are chosen by them.
        return leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device.type
    return type(leaf), leaf


def _objection(eager: Any, replayed: Any) -> str:
    """Why a recording is no good, or nothing."""
    pairs = zip(tensors_in(eager), tensors_in(replayed), strict=True)
    return "" if all(map(_equal, pairs)) else "its graph gives other numbers"


def _equal(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """A request whose numbers overflowed is no reason to refuse the shape."""
    one, other = pair
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
