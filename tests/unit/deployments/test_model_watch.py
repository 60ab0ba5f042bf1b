"""What is known of the models, and when."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
from ray.exceptions import RayActorError

from service.api.backend import ModelStatus
from service.deployments import model_watch
from service.deployments.model_watch import ModelWatch
from service.domain.errors import NotReadyError
from service.domain.models import ModelCapabilities, SizeRange

EMOJI = ModelCapabilities("emoji", "small", SizeRange(8, 64, 8, 64), ("DDIM",), "DDIM")


class Model:
    """Answers when it is told to; until then it loads."""

    def __init__(self) -> None:
        self.loaded = asyncio.Event()
        self.error: Exception | None = None
        self.asked = 0

    async def __call__(self) -> ModelCapabilities:
        self.asked += 1
        await self.loaded.wait()
        if self.error is not None:
            raise self.error
        return EMOJI


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_watch, "FIRST_LOOK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL_S", 0.01)


async def until(watch: ModelWatch, **wanted: object) -> ModelStatus:
    async with asyncio.timeout(5):
        while True:
            status = watch.statuses()[0]
            if wanted.items() <= dataclasses.asdict(status).items():
                return status
            await asyncio.sleep(0.005)


async def started(model: Model) -> ModelWatch:
    watch = ModelWatch({"emoji": model})
    await watch.start()
    return watch


async def test_who_is_there_is_known_once_it_started() -> None:
    model = Model()
    model.loaded.set()
    watch = await started(model)
    assert watch.statuses() == [ModelStatus(EMOJI, ready=True)]
    assert await watch.status("emoji") == ModelStatus(EMOJI, ready=True)
    assert await watch.status("pizza") is None


async def test_who_loads_is_told_at_once_among_all_and_waited_for_when_named() -> None:
    model = Model()
    watch = await started(model)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "loading")]

    naming = [asyncio.create_task(watch.status("emoji")) for _ in range(8)]
    await asyncio.sleep(0.01)
    model.loaded.set()
    assert [status.ready for status in await asyncio.gather(*naming) if status] == [True] * 8


async def test_who_is_cancelled_while_it_waits_stops_no_other() -> None:
    model = Model()
    watch = await started(model)
    leaving, staying = (asyncio.create_task(watch.status("emoji")) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    model.loaded.set()
    status = await staying
    assert status is not None
    assert status.ready


async def test_one_that_never_answers_is_loading_and_named_after_a_brief_wait() -> None:
    watch = await started(Model())
    status = await watch.status("emoji")
    assert status is not None
    assert (status.ready, status.is_known) == (False, False)


async def test_a_model_that_loads_is_asked_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two questions nobody would hear that it became ready."""
    monkeypatch.setattr(model_watch, "PROBE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL_S", 60.0)
    model = Model()
    watch = await started(model)
    model.loaded.set()
    await until(watch, ready=True)
    assert model.asked > 2


async def test_what_a_replica_says_of_itself_is_told_and_its_limits_stay_known() -> None:
    model = Model()
    model.loaded.set()
    watch = await started(model)
    model.error = NotReadyError("draining", 1.0)
    status = await until(watch, ready=False)
    assert (status.detail, status.is_known) == ("draining", True)
    model.error = RayActorError()
    await until(watch, ready=False, detail="unavailable: RayActorError")
    model.error = None
    await until(watch, ready=True)


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
