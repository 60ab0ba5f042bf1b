"""A denoiser's forward, compiled by `torch.compile` for the row counts of shared forwards.

It takes seconds to minutes for each shape, so all of it is done before a model serves. From then
on a shape is always served in the same way: compiled if it was compiled, else eager. Nothing is
ever compiled while a request waits.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepserve.engine.calls.arguments import flatten, unflatten
from stepserve.engine.calls.call_key import CallArguments
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
        self, eager: Forward, examples: Sequence[CallArguments], backend: Backend = "inductor"
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


class UniformArguments:
    """Brings the arguments of a denoiser into the form that its graphs were compiled for.

    A call that shares no forward keeps its timestep as the pipeline made it: one number, an integer
    or not as its scheduler likes. Stacked calls have one a row, of shape (rows,). A denoiser takes
    all of these for the same.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        names = list(inspect.signature(forward).parameters)
        self._place = names.index("timestep") if "timestep" in names else None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """Return the same arguments with one timestep a row, and densely laid out."""
        rows = rows_of(args, kwargs)
        if "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": _one_a_row(kwargs["timestep"], rows)}
        elif self._place is not None and self._place < len(args):
            timestep = _one_a_row(args[self._place], rows)
            args = (*args[: self._place], timestep, *args[self._place + 1 :])
        leaves, structure = flatten((args, kwargs))
        uniform: CallArguments = unflatten(structure, map(_dense, leaves))
        return uniform


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The leading size of the first tensor that has dimensions; 1 where there is none."""
    leaves, _ = flatten((args, list(kwargs.values())))
    sizes = (leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next(sizes, 1)


def shape_of(call: CallArguments) -> Hashable:
    """Equal for calls that the same graph can serve."""
    leaves, structure = flatten(call)
    return structure, tuple(_describe(leaf) for leaf in leaves)


def _one_a_row(timestep: Any, rows: int) -> Any:
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1:
        return _fractional(timestep)
    return _fractional(timestep.reshape(1)).expand(rows)


def _fractional(timestep: Any) -> Any:
    whole = isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()
    return timestep.float() if whole else timestep


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, tuple(leaf.shape), leaf.device
    return type(leaf), repr(leaf)


def _dense(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf


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
