"""A forward compiled in the background, while its eager code serves.

`torch.compile` takes seconds to minutes for each shape. So a thread compiles every row bucket of
the native shape first, and only when all are ready compiled code is handed out. From then on it
serves a shape always in the same way: compiled if it was compiled, else eager.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from stepserve.domain.errors import StepserveError
from stepserve.pipelines.modules.call_shapes import Example, UniformArguments, shape_of
from stepserve.private_files import make_private_folder

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]
LOWEST_PRIORITY = 19
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SWITCH_INTERVAL_S = 20e-6
"""How long the compiling thread may keep the interpreter's lock while others want it.

The engine lets go of it in every operation of torch, hundreds of times in a forward, and gets it
back after this long at the earliest. With Python's own 5 ms four requests of 20 steps took 18 s
instead of one while the compiler was tracing; with 20 us, 3 s.
"""


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
        self.module = module
        self.eager: Forward = module.forward
        self._run = self.eager
        functools.update_wrapper(self, self.eager)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run whichever code is in use."""
        return self._run(*args, **kwargs)

    @property
    def in_use(self) -> str:
        """`eager` or `compiled`: the two round differently, so an image depends on it."""
        return "eager" if self._run is self.eager else "compiled"

    def switch(self, run: Forward) -> None:
        """Use `run` from the next forward on."""
        self._run = run


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Powers of two up to `max_rows`, and that itself: few graphs, at most half of one unused.

    There is none of one row: the compiler makes other kernels for it, which round differently, so
    that the bits of an image would depend on its company.
    """
    powers = (2**n for n in range(1, max_rows.bit_length()))
    return tuple(sorted({*(rows for rows in powers if rows < max_rows), max_rows}))


class BackgroundCompiler:
    """Compiles a forward for every example on a thread of its own, then switches once.

    Args:
        forward: the eager forward of the module.
        examples: arguments of one call for each graph, in the order in which they are compiled.
        switch: called on that thread with the compiled forward when all graphs are ready, and with
            the eager one should a graph ever turn out not to fit the calls it was made for. What it
            raises counts as a failure to compile.
        threads: torch threads of the thread that will run it. A graph is made for a number of
            threads and does not fit any other.
        backend: as `torch.compile` takes it.
    """

    def __init__(
        self,
        forward: Forward,
        examples: Sequence[Example],
        switch: Callable[[Forward], None],
        threads: int,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.state = CompileState.COMPILING
        self.reason = self.public_reason = ""
        self.graphs_ready = 0
        self.graphs_wanted = len(examples)
        self._eager = forward
        self._examples = list(examples)
        self._switch = switch
        self._threads = threads
        self._compiled: Forward = torch.compile(forward, backend=backend, dynamic=False)
        self._uniform = UniformArguments(forward)
        uniform = (self._uniform(e.args, e.kwargs) for e in examples)
        self._shapes = frozenset(shape_of(example) for example in uniform)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="compile", daemon=True)

    def start(self) -> None:
        """Begin to compile."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> CompileState:
        """Wait until it is ready or has failed, or until the time is over."""
        self._thread.join(timeout_s)
        return self.state

    def stop(self) -> None:
        """Make no further graph, and do not switch; a graph under way is not interrupted."""
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
        # Beyond this number torch would quietly run eager code. Each thread has a limit of its own.
        torch._dynamo.config.recompile_limit = 2 * len(self._examples)
        try:
            _make_cache_private()
            with _sharing_the_interpreter():
                self._compile_all()
            self._check_not_stopped()
            self.state = CompileState.READY
            self._switch(self.run)
        except Exception as error:
            self._give_up(error)
        finally:
            # They hold tensors.
            self._examples.clear()

    def _compile_all(self) -> None:
        for example in self._examples:
            self._check_not_stopped()
            self._compile(example)
            self.graphs_ready += 1

    def _check_not_stopped(self) -> None:
        if self._stopping.is_set():
            raise InterruptedError("stopped before everything was compiled")

    def _compile(self, example: Example) -> None:
        call = self._uniform(example.args, example.kwargs)
        self._compiled(*call.args, **call.kwargs)

    def _give_up(self, error: Exception) -> None:
        # Torch writes what failed on the first line, why on the second, and much below.
        lines = str(error).strip().splitlines()[:2]
        self.reason = " ".join([f"{type(error).__name__}:", *lines])
        logger.warning("the denoiser is served by eager code: %s", self.reason)
        ours = isinstance(error, InterruptedError | StepserveError)
        told = f"torch.compile failed ({type(error).__name__}); the log says why"
        self.public_reason = str(error) if ours else told
        if self.state is CompileState.READY:
            self._switch(self._eager)
        self.state = CompileState.FAILED


@contextmanager
def _sharing_the_interpreter() -> Iterator[None]:
    """Have threads take turns more often, in all of this process."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)


def _step_back() -> None:
    """Compiling takes a core for minutes, and must not take it from the engine."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    except (AttributeError, OSError) as error:
        logger.info("the compiling thread keeps its priority: %s", error)


def _make_cache_private() -> None:
    """Make sure that torch runs no code of other users.

    It keeps compiled code, by default in a folder of a known name where all users may make one.

    Raises:
        NotPrivateError: another user could put code into it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get(CACHE_VARIABLE) or default_cache_dir()
    os.environ[CACHE_VARIABLE] = folder
    make_private_folder(Path(folder))
