"""A denoiser's forward, compiled by `torch.compile` for the row counts of shared forwards.

It takes seconds to minutes for each shape, so all of it is done before a model serves. From then
on a shape is always served in the same way: compiled if it was compiled, else eager. Nothing is
ever compiled while a request waits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepserve.pipelines.modules.call_shapes import Arguments, UniformArguments, shape_of
from stepserve.private_files import make_private_folder

Forward = Callable[..., Any]
Backend = str | Callable[..., Any]
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledForward:
    """Runs the graph that was compiled for a shape, or eager code where there is none.

    Compiles when it is constructed, which must happen on the thread that will run it: a graph is
    made for a number of threads and for a mode of gradients, and fits no other.

    Args:
        eager: the forward of the module.
        examples: arguments of one call for each graph.
        backend: as `torch.compile` takes it.

    Raises:
        NotPrivateError: another user could put code into the folder of compiled code.
        Exception: whatever the compiler raises.
    """

    def __init__(
        self, eager: Forward, examples: Sequence[Arguments], backend: Backend = "inductor"
    ) -> None:
        functools.update_wrapper(self, eager, updated=())
        self._eager = eager
        self._uniform = UniformArguments(eager)
        self._compiled: Forward = torch.compile(eager, backend=backend, dynamic=False)
        calls = [self._uniform(*example) for example in examples]
        self._shapes = frozenset(map(shape_of, calls))
        _make_cache_private()
        # Beyond this number torch would quietly run eager code.
        limit = torch._dynamo.config.patch(recompile_limit=2 * len(calls))
        with torch.no_grad(), limit:
            for args, kwargs in calls:
                self._compiled(*args, **kwargs)
            # One that fits no later call would quietly run eager code.
            with torch.compiler.set_stance("fail_on_recompile"):
                for args, kwargs in calls:
                    self._compiled(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on tensors of shape (rows, ...)."""
        call = self._uniform(args, kwargs)
        if shape_of(call) not in self._shapes:
            return self._eager(*args, **kwargs)
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(*call[0], **call[1])


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
