"""Leases of API keys, as an ingress holds them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from stepserve.api.auth.keys import ApiKey
from stepserve.api.auth.usage import Grant
from stepserve.ray_serve.ingress.shared_usage import SharedUsage


class Counter:
    """As Ray Serve's handle of a `UsageCounter`: each method has a `remote`."""

    def __init__(self) -> None:
        self.errors = [RuntimeError("no router"), KeyError("none")]
        self.renewed: asyncio.Queue[Any] = asyncio.Queue()
        self.take = self._method(self._take)
        self.renew = self._method(self._renew)

    def _method(self, call: Callable[..., Any]) -> SimpleNamespace:
        return SimpleNamespace(remote=call)

    async def _take(self, key: ApiKey, lease: str) -> Grant:
        return Grant()

    def _renew(self, held: Any) -> None:
        if self.errors:
            raise self.errors.pop()
        self.renewed.put_nowait(held)


@pytest.mark.virtual_time
async def test_leases_are_renewed_again_whatever_became_of_the_last_time() -> None:
    counter = Counter()
    usage = SharedUsage(counter)
    await usage.take(ApiKey(name="a", sha256="0" * 64), "lease")
    assert await counter.renewed.get() == {"a": ("lease",)}
    assert counter.errors == []
    assert usage._renewing is not None
    usage._renewing.cancel()
