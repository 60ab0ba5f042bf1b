"""What calls of one shape need of their method, found out when the first of them comes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from stepserve.engine.calls.call import Call, ParkableMethod


class ShapeMethods:
    """Gives each call the method for its shape. For the engine's thread.

    Args:
        find: the method for calls like this one; asked once for each shape.
    """

    def __init__(self, find: Callable[[Call], ParkableMethod]) -> None:
        self._find = find
        self._methods: dict[Hashable, ParkableMethod] = {}

    def give(self, call: Call) -> Call:
        """The call itself where it has that method already."""
        shape = call.key.shape
        if shape not in self._methods:
            self._methods[shape] = self._find(call)
        method = self._methods[shape]
        return call if call.method is method else replace(call, method=method)
