"""What is known of the models, and when."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError
from stepserve.domain.model_status import ModelStatus, unknown_status
from stepserve.domain.models import ModelCapabilities, SizeRange
from stepserve.ray_serve import model_watch
from stepserve.ray_serve.applications import Listed
from stepserve.ray_serve.ingress.model_watch import ModelWatch

EMOJI = ModelCapabilities("emoji", "small", SizeRange(8, 64, 8, 64), ("DDIM",), "DDIM")


READY = ModelStatus(EMOJI, ready=True)


class Models:
    """Those that Ray Serve lists; each answers when it is told to, and loads until then."""

    def __init__(self) -> None:
        self.listed = {"emoji": Listed()}
        self.list_error: Exception | None = None
        self.loaded = asyncio.Event()
        self.answer: ModelStatus | Exception = READY
        self.asked = 0
        self.woken = 0
        self.looks = 0

    async def list_models(self) -> dict[str, Listed]:
        self.looks += 1
        if self.list_error is not None:
            raise self.list_error
        return dict(self.listed)

    async def ask(self, model_id: str) -> ModelStatus | None:
        self.asked += 1
        if not self.loaded.is_set():
            return None
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def wake(self, model_id: str) -> ModelStatus | None:
        self.woken += 1
        await self.loaded.wait()
        return await self.ask(model_id)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_watch, "FIRST_LOOK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr(model_watch, "STEADY_LISTING_S", 0.02)
    monkeypatch.setattr(model_watch, "LOADING_INTERVAL_S", 0.01)


async def until(watch: ModelWatch, **wanted: object) -> ModelStatus:
    async with asyncio.timeout(5):
        while True:
            status = watch.statuses()[0]
            if wanted.items() <= dataclasses.asdict(status).items():
                return status
            await asyncio.sleep(0.005)


async def started(models: Models) -> ModelWatch:
    watch = ModelWatch(models.list_models, models.ask, models.wake, {"emoji": ("dall-e-2",)})
    await watch.start()
    return watch


async def test_who_is_there_is_known_once_it_started() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    assert watch.statuses() == [READY]
    assert await watch.status("emoji") == READY
    assert await watch.status("pizza") is None


async def test_aliases_are_those_of_the_start_until_the_model_tells_its_own() -> None:
    models = Models()
    models.listed["added later"] = Listed()
    models.answer = ModelStatus(replace(EMOJI, aliases=("gpt-image-1",)), ready=True)
    watch = await started(models)
    loading = [status.capabilities.aliases for status in watch.statuses()]
    models.loaded.set()

    assert loading == [("dall-e-2",), ()]
    told = await until(watch, ready=True)
    assert told.capabilities.aliases == ("gpt-image-1",)


async def test_models_are_seldom_listed_while_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_watch, "STEADY_LISTING_S", 60.0)
    models = Models()
    models.loaded.set()
    watch = await started(models)
    await asyncio.sleep(0.3)
    # While anything changes it would be thirty.
    assert models.looks <= 2
    # A model that nobody has heard of may be new.
    models.listed["pizza"] = Listed()
    assert await watch.status("pizza") == READY
    models.answer = replace(READY, detail="draining")
    await until(watch, detail="draining")
    await asyncio.sleep(0.1)
    assert models.looks > 4


async def test_who_loads_is_told_at_once_among_all_and_waited_for_when_named() -> None:
    model = Models()
    watch = await started(model)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "loading")]

    naming = [asyncio.create_task(watch.status("emoji")) for _ in range(8)]
    await asyncio.sleep(0.01)
    model.loaded.set()
    assert [status.ready for status in await asyncio.gather(*naming) if status] == [True] * 8


async def test_who_is_cancelled_while_it_waits_stops_no_other() -> None:
    model = Models()
    watch = await started(model)
    leaving, staying = (asyncio.create_task(watch.status("emoji")) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    model.loaded.set()
    status = await staying
    assert status is not None
    assert status.ready


async def test_one_that_never_answers_is_loading_and_named_after_a_brief_wait() -> None:
    watch = await started(Models())
    status = await watch.status("emoji")
    assert status is not None
    assert (status.ready, status.is_known) == (False, False)


async def test_a_model_that_loads_is_asked_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for it should hear at once that it is there."""
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL_S", 60.0)
    model = Models()
    watch = await started(model)
    model.loaded.set()
    await until(watch, ready=True)
    assert model.asked > 2


async def test_what_a_replica_says_of_itself_is_told_and_its_limits_stay_known() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.answer = ModelStatus(EMOJI, ready=False, detail="draining")
    await until(watch, ready=False, detail="draining")
    model.answer = READY
    await until(watch, ready=True, detail="")


@pytest.mark.parametrize("error", [RayActorError(), KeyError("does not exist."), ValueError()])
async def test_a_model_is_asked_again_whatever_became_of_the_question(error: Exception) -> None:
    model = Models()
    model.loaded.set()
    model.answer = error
    watch = await started(model)
    await until(watch, ready=False, detail="loading")
    asked = model.asked
    model.answer = READY
    await until(watch, ready=True)
    assert model.asked > asked


async def test_models_are_listed_again_whatever_became_of_the_last_time() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.list_error = TypeError()
    looks = model.looks
    async with asyncio.timeout(5):
        while model.looks < looks + 2:
            await asyncio.sleep(0.005)
    model.list_error = None
    model.listed["pizza"] = Listed()
    async with asyncio.timeout(5):
        while len(watch.statuses()) < 2:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [RayActorError(), ValueError()])
async def test_a_first_listing_that_fails_keeps_nobody_from_starting(error: Exception) -> None:
    """As while Ray Serve's controller is replaced: an ingress that raised would not be."""
    models = Models()
    models.loaded.set()
    models.list_error = error
    watch = await started(models)
    assert watch.statuses() == []
    models.list_error = None
    async with asyncio.timeout(5):
        while await watch.status("emoji") != READY:
            await asyncio.sleep(0.005)


async def test_a_short_silence_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_watch, "SILENCE_S", 1.0)
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.answer = RayActorError()
    await asyncio.sleep(0.05)
    assert watch.statuses() == [READY]
    status = await until(watch, ready=False, detail="loading")
    assert status.is_known
    model.answer = READY
    await until(watch, ready=True, detail="")


async def test_models_come_and_go() -> None:
    models = Models()
    models.loaded.set()
    watch = await started(models)
    models.listed["sd"] = Listed()
    async with asyncio.timeout(5):
        while len(watch.statuses()) < 2:
            await asyncio.sleep(0.005)
    del models.listed["emoji"]
    async with asyncio.timeout(5):
        while await watch.status("emoji") is not None:
            await asyncio.sleep(0.005)
    assert await watch.status("sd") == READY


async def test_a_model_that_was_given_up_says_why_whatever_it_answers() -> None:
    models = Models()
    models.loaded.set()
    models.listed["emoji"] = Listed(failure="failed: out of memory")
    watch = await started(models)
    # Replicas of before may still be at work: to be asked tells them that somebody waits.
    async with asyncio.timeout(5):
        while models.asked < 3:
            await asyncio.sleep(0.005)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "failed: out of memory")]


async def test_a_sleeping_model_takes_requests_and_is_not_woken_by_questions() -> None:
    models = Models()
    models.loaded.set()
    models.answer = replace(READY, capabilities=replace(EMOJI, load_s=12.3))
    watch = await started(models)
    models.listed["emoji"] = Listed(asleep=True)
    detail = "asleep: the next request waits 12 s for it"
    await until(watch, ready=True, detail=detail)
    asked = models.asked
    await asyncio.sleep(0.1)
    assert models.asked == asked

    models.loaded.clear()
    models.listed["emoji"] = Listed()
    await until(watch, ready=True, detail="waking up")
    models.loaded.set()
    await until(watch, ready=True, detail="")


async def test_a_sleeping_model_that_was_never_seen_is_woken_once_to_tell_its_limits() -> None:
    """As after a restart of the ingress: without them no request of it could be taken."""
    models = Models()
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "loading")]
    models.loaded.set()
    await until(watch, ready=True, detail="asleep")
    await asyncio.sleep(0.1)
    assert (models.woken, models.asked) == (1, 1)


async def test_a_sleeping_model_that_cannot_be_loaded_is_not_woken_again_and_again() -> None:
    models = Models()
    models.loaded.set()
    models.answer = unknown_status("emoji", "cannot be loaded: no weights")
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    await until(watch, ready=False, detail="cannot be loaded: no weights")
    await asyncio.sleep(0.1)
    assert models.woken == 1

    models.answer = RayActorError()
    models.listed["emoji"] = Listed()
    await until(watch, ready=False, detail="loading")
    models.listed["emoji"] = Listed(asleep=True)
    await until(watch, ready=False, detail="cannot be loaded: no weights")
    assert models.woken == 1


async def test_a_sleeping_model_that_cannot_be_woken_is_tried_again() -> None:
    models = Models()
    models.loaded.set()
    models.answer = RayActorError()
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    await until(watch, ready=False, detail="loading")
    models.answer = READY
    await until(watch, ready=True, detail="asleep")


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
