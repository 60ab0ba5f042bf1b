"""Schedulers that work out each coefficient once.

Half of the time outside modules is spent in `scheduler.step`, and most of that on single numbers:
every operation on a tensor without dimensions takes microseconds, and the multistep solvers do
dozens at each step. The numbers depend on the noise schedule alone, so requests of equal step
counts work out the same ones, and each step works out again what the one before it knew.

The code of the schedulers is diffusers' own. Only pure functions of one number are remembered, by
all that decides their answer, so that what is remembered is that answer in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch

from stepserve.pipelines.modules.third_party.rebinding import with_names

MOST_NUMBERS = 4096
NumberFunction = Callable[[torch.Tensor], Any]

# Methods of one sigma and the scheduler's settings, which are the same for all that it is lent to.
METHODS_OF_SIGMA = ("_sigma_to_alpha_sigma_t",)
# Methods that take logarithms of single tensors by way of numpy, by class.
METHODS_WITH_LOGARITHMS = {
    "DEISMultistepScheduler": (
        "multistep_deis_second_order_update",
        "multistep_deis_third_order_update",
    ),
}


def memoize_numbers(function: NumberFunction) -> NumberFunction:
    """A pure function of one number that remembers its answers; other arguments pass through.

    Nobody may write into its answers. It asks nothing of other devices than the CPU, as that would
    have to wait for them.
    """

    @lru_cache(MOST_NUMBERS)
    def known(value: float, dtype: torch.dtype, in_inference_mode: bool) -> Any:
        return function(torch.tensor(value, dtype=dtype, device="cpu"))

    def answer(number: Any) -> Any:
        if not _is_number(number):
            return function(number)
        value = number.item()
        # Zeros of both signs compare equal, and what is no number equals nothing.
        if value == 0 or value != value:
            return function(number)
        # Tensors that were made in inference mode are not to be used elsewhere.
        return known(value, number.dtype, torch.is_inference_mode_enabled())

    return answer


def memoizing_class(scheduler: Any) -> type:
    """A subclass for copies of one scheduler that share what they remember.

    Its name is that of the scheduler's class, which is returned as it is if nothing in it is to be
    remembered.
    """
    cls = type(scheduler)
    names = [name for name in METHODS_OF_SIGMA if hasattr(cls, name)]
    methods: dict[str, Any] = {name: _remember_method(scheduler, name) for name in names}
    log = memoize_numbers(np.log)
    for name in METHODS_WITH_LOGARITHMS.get(cls.__name__, ()):
        methods[name] = _with_logarithm(getattr(cls, name), log)
    return type(cls.__name__, (cls,), methods) if methods else cls


def _remember_method(scheduler: Any, name: str) -> Callable[[Any, torch.Tensor], Any]:
    original = getattr(type(scheduler), name)
    settings = scheduler.config
    remembered = memoize_numbers(getattr(scheduler, name))

    def answer(self: Any, sigma: torch.Tensor) -> Any:
        # Copies share the very settings, until a pipeline gives one others.
        return remembered(sigma) if self.config is settings else original(self, sigma)

    return answer


class _NumpyWithLog:
    def __init__(self, log: NumberFunction) -> None:
        self.log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _with_logarithm(method: FunctionType, log: NumberFunction) -> FunctionType:
    """The same code, but what it knows as `np.log` is `log`."""
    return with_names(method, {"np": _NumpyWithLog(log)})


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.device.type == "cpu"
        and not value.requires_grad
    )
