"""Calls that many make at once, and that are made once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class SharedCalls(Generic[Value]):
    """Who calls while an equal call is pending gets its result, or its error."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Value]] = {}

    async def result(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """The result of the `call` that is named `key`, which goes on if somebody stops waiting."""
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(call())
            task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(self._running[key])
