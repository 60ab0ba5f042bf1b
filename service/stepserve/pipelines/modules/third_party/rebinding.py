"""A function of somebody else's, to which some of its global names mean something else."""

from __future__ import annotations

from types import FunctionType
from typing import Any


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
