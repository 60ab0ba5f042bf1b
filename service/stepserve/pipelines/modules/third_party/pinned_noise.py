"""Keeps on the host what schedulers look at, so that Python never waits for the device at a step.

diffusers' pipelines put timesteps on the device, where every look at one waits for all that was
launched before. Schedulers take timesteps from the CPU as well (diffusers does so itself on XLA);
a denoiser gets copies of them where it is. Noise is drawn on the CPU from the request's own
generator. Both are copied from pinned memory, which happens while Python goes on.

Nothing of this changes a number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import torch
from diffusers.utils import torch_utils

from stepserve.engine.calls.arguments import flatten, unflatten

NOISE = "randn_tensor"
# Those whose Python was seen to take timesteps from the host.
PIPELINES = ("StableDiffusion*Pipeline",)


def can_keep_on_host(pipeline: Any, device: torch.device) -> bool:
    """Whether a pipeline gains from it, and is known to go on as before."""
    name = type(pipeline).__name__
    return device.type == "cuda" and any(fnmatchcase(name, pattern) for pattern in PIPELINES)


def on_host(scheduler_class: type) -> type:
    """A subclass of the same name whose timesteps stay on the CPU and whose noise is pinned."""
    methods: dict[str, Any] = dict(_with_pinned_noise(scheduler_class))
    methods["set_timesteps"] = _then_on_cpu(scheduler_class.set_timesteps)  # type: ignore[attr-defined]
    return type(scheduler_class.__name__, (scheduler_class,), methods)


def with_pinned_noise(cls: type) -> type:
    """A subclass of the same name that draws its noise into pinned memory."""
    return type(cls.__name__, (cls,), dict(_with_pinned_noise(cls)))


def on_device(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A forward that gets every tensor on its device, wherever the caller has it."""

    @functools.wraps(forward)
    def brought(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = flatten((args, kwargs))
        args, kwargs = unflatten(structure, (_bring(leaf, device) for leaf in leaves))
        return forward(*args, **kwargs)

    return brought


def from_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, of any shape, where it can be copied to a device without waiting."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def pinned_randn_tensor(
    shape: Any,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> torch.Tensor:
    """A tensor of `shape`, as diffusers' `randn_tensor` gives it, without waiting for its copy."""
    draw = functools.partial(torch_utils.randn_tensor, shape, generator, dtype=dtype, layout=layout)
    target = torch.device(device) if device is not None else torch.device("cpu")
    if target.type != "cuda" or not _are_on_cpu(generator):
        return draw(device=device)
    return _bring(draw(device=torch.device("cpu")), target)


def _bring(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.device.type == device.type:
        return leaf
    return from_pinned(leaf).to(device, non_blocking=True)


def _are_on_cpu(generator: torch.Generator | list[torch.Generator] | None) -> bool:
    generators = generator if isinstance(generator, list) else [generator]
    return all(one is not None and one.device.type == "cpu" for one in generators)


def _then_on_cpu(set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
    """The timesteps alone: some schedulers work out sigmas on the device, and compute with them."""

    # Pipelines read the signature to see what they may give.
    @functools.wraps(set_timesteps)
    def then_on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned = set_timesteps(self, *args, **kwargs)
        self.timesteps = self.timesteps.cpu()
        return returned

    return then_on_cpu


def _with_pinned_noise(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if NOISE in method.__code__.co_names and not hasattr(method, "__wrapped__"):
            yield name, with_names(method, {NOISE: pinned_randn_tensor})


def with_names(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same code, to which some global names mean something else."""
    other = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other
