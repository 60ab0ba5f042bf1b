"""The denoiser compiled in the background, while its eager code serves.

`torch.compile` takes seconds to minutes for each shape. So a thread compiles every row bucket of
the native shape first, and only when all are ready the module changes over, between two forwards.
From then on a shape is always served in the same way: compiled if it was compiled, else eager.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch

from service.pipelines.call_shapes import (
    Example,
    UniformArguments,
    examples_by_bucket,
    shape_of,
)

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
LOWEST_PRIORITY = 19


class CompileState(StrEnum):
    """How far a background compilation is."""

    COMPILING = "compiling"
    READY = "ready"
    FAILED = "failed"


class SwitchableForward:
    """Takes the place of `forward` on one module instance, and can change what it runs.

    Install it before `attach`, so that parked calls run through it. Changing over is one
    assignment: a forward that is under way ends as it began.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.eager: Forward = module.forward
        self.compiler: BackgroundCompiler | None = None
        self._latest: Example | None = None
        self._recording = True
        self._run = self.eager
        functools.update_wrapper(self, self.eager)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run whichever code is in use."""
        if self._recording:
            self._latest = Example(args, kwargs)
        return self._run(*args, **kwargs)

    @property
    def in_use(self) -> str:
        """`eager` or `compiled`: the two round differently, so a picture depends on it."""
        return "eager" if self._run is self.eager else "compiled"

    def switch(self, run: Forward) -> None:
        """Use `run` from the next forward on."""
        self._run = run

    def start_compiling(
        self, buckets: Sequence[int], threads: int, backend: str = "inductor"
    ) -> BackgroundCompiler:
        """Compile for calls like the latest one, with each of these row counts.

        To be called when the module was warmed up at its native size.

        Raises:
            RuntimeError: the module was never called.
        """
        if self._latest is None:
            raise RuntimeError("nothing to compile for: the module was never called")
        examples = examples_by_bucket(self._latest, buckets)
        self._latest, self._recording = None, False
        self.compiler = BackgroundCompiler(self.eager, examples, self.switch, threads, backend)
        self.compiler.start()
        return self.compiler


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Powers of two up to `max_rows`, and that itself: few graphs, at most half of one unused."""
    powers = (2**n for n in range(max_rows.bit_length()))
    return tuple(sorted({*(rows for rows in powers if rows < max_rows), max_rows}))


class BackgroundCompiler:
    """Compiles a forward for every row bucket on a thread of its own, then switches once.

    Args:
        forward: the eager forward of the module.
        examples: arguments of one call for each bucket.
        switch: called with the compiled forward when all buckets are ready, and with the eager one
            should a compiled graph ever turn out not to fit the calls it was made for.
        threads: torch threads of the thread that will run it. A graph is made for a number of
            threads and does not fit any other.
        backend: as `torch.compile` takes it.
    """

    def __init__(
        self,
        forward: Forward,
        examples: Mapping[int, Example],
        switch: Callable[[Forward], None],
        threads: int,
        backend: str = "inductor",
    ) -> None:
        self.state = CompileState.COMPILING
        self.reason = ""
        self.buckets_ready: tuple[int, ...] = ()
        self._eager = forward
        self._examples = dict(examples)
        self._switch = switch
        self._threads = threads
        # Beyond this number torch would quietly run eager code.
        limit = max(torch._dynamo.config.recompile_limit, 2 * len(self._examples))
        torch._dynamo.config.recompile_limit = limit
        self._compiled: Forward = torch.compile(forward, backend=backend, dynamic=False)
        self._uniform = UniformArguments(forward)
        uniform = (self._uniform(e.args, e.kwargs) for e in self._examples.values())
        self._shapes = frozenset(shape_of(example) for example in uniform)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="compile", daemon=True)

    def start(self) -> None:
        """Begin to compile, the smallest bucket first."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> CompileState:
        """Wait until it is ready or has failed, or until the time is over."""
        self._thread.join(timeout_s)
        return self.state

    def stop(self) -> None:
        """Compile no further bucket; one that is under way is not interrupted."""
        self._stopping.set()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that was compiled for this shape, or eager code where there is none."""
        call = self._uniform(args, kwargs)
        if self.state is not CompileState.READY or shape_of(call) not in self._shapes:
            return self._eager(*args, **kwargs)
        try:
            # Never compile here: everybody would wait for it.
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._compiled(*call.args, **call.kwargs)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            self._give_up(error)
        return self._eager(*args, **kwargs)

    def _main(self) -> None:
        _step_back()
        torch.set_num_threads(self._threads)
        # What a graph is made for includes that there are no gradients, as on the engine's thread.
        torch.set_grad_enabled(False)
        try:
            for rows in sorted(self._examples):
                if self._stopping.is_set():
                    raise InterruptedError("stopped before all buckets were compiled")
                self._compile(self._examples[rows])
                self.buckets_ready += (rows,)
        except Exception as error:
            self._give_up(error)
        else:
            self.state = CompileState.READY
            self._switch(self.run)
        finally:
            # They hold tensors.
            self._examples.clear()

    def _compile(self, example: Example) -> None:
        call = self._uniform(example.args, example.kwargs)
        self._compiled(*call.args, **call.kwargs)

    def _give_up(self, error: Exception) -> None:
        # Torch writes what failed on the first line, why on the second, and much below.
        lines = str(error).strip().splitlines()[:2]
        self.reason = " ".join([f"{type(error).__name__}:", *lines])
        logger.warning("the denoiser is served by eager code: %s", self.reason)
        if self.state is CompileState.READY:
            self._switch(self._eager)
        self.state = CompileState.FAILED


def _step_back() -> None:
    """Compiling takes a core for minutes, and must not take it from the engine."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    except (AttributeError, OSError) as error:
        logger.info("the compiling thread keeps its priority: %s", error)
