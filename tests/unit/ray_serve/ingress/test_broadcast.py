"""What is heard where not all replicas answer."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence

import pytest
from ray.exceptions import RayActorError
from stepserve.ray_serve.ingress.broadcast import responses


class Replica:
    """Answers, fails or is silent, and notes whether somebody still listens."""

    def __init__(self, response: str = "", error: Exception | None = None) -> None:
        self.response, self.error = response, error
        self.is_asked, self.is_left = asyncio.Event(), False

    async def get_async(self) -> str:
        self.is_asked.set()
        try:
            return await self._reply()
        except asyncio.CancelledError:
            self.is_left = True
            raise

    async def _reply(self) -> str:
        if self.error is not None:
            raise self.error
        if not self.response:
            await asyncio.Event().wait()
        return self.response


class Question:
    def __init__(self, *replicas: Replica, is_sent: bool = True) -> None:
        self.replicas, self.is_sent = replicas, is_sent

    async def _fetch_replica_results_async(self) -> Sequence[Replica]:
        if not self.is_sent:
            await asyncio.Event().wait()
        return self.replicas


async def test_who_answers_is_heard_although_others_fail_or_are_silent() -> None:
    silent = Replica()
    question = Question(Replica("a"), silent, Replica(error=RayActorError()), Replica("b"))
    assert sorted(await responses(question, 0.05)) == ["a", "b"]
    await asyncio.sleep(0)
    assert silent.is_left


async def test_nobody_is_waited_for_once_all_have_answered() -> None:
    began_s = time.monotonic()
    assert await responses(Question(Replica("a"), Replica(error=ValueError())), 30.0) == ["a"]
    assert await responses(Question(), 30.0) == []
    assert time.monotonic() - began_s < 10


async def test_a_question_that_cannot_be_sent_times_out() -> None:
    with pytest.raises(TimeoutError):
        await responses(Question(is_sent=False), 0.01)


async def test_who_asked_and_left_leaves_nothing_behind() -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    silent = Replica()
    asking = asyncio.create_task(responses(Question(silent, Replica(error=ValueError())), 30.0))
    await silent.is_asked.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0)
    gc.collect()
    assert silent.is_left
    assert told == []
