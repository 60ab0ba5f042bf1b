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
from stepserve.ray_serve.applications import Listed
from stepserve.ray_serve.ingress.model_watch import (
    COMPILING,
    LOADING,
    LOADING_INTERVAL_S,
    PROBE_INTERVAL_S,
    SILENCE_S,
    STEADY_LISTING_S,
    ModelWatch,
)
from virtual_time import clock, pass_time, until

EMOJI = ModelCapabilities("emoji", "small", SizeRange(8, 64, 8, 64), ("DDIM",), "DDIM")
READY = ModelStatus(EMOJI, ready=True)

pytestmark = pytest.mark.virtual_time


class Models:
    """Those that Ray Serve lists; each answers when it is told to, and loads until then."""

    def __init__(self) -> None:
        self.listed = {"emoji": Listed()}
        self.list_error: Exception | None = None
        self.loaded = asyncio.Event()
        self.response: ModelStatus | Exception = READY
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
        if isinstance(self.response, Exception):
            raise self.response
        return self.response

    async def wake(self, model_id: str) -> ModelStatus | None:
        self.woken += 1
        await self.loaded.wait()
        return await self.ask(model_id)


async def told(watch: ModelWatch, **wanted: object) -> ModelStatus:
    """The status of the first model, once it is as wanted."""
    await until(lambda: wanted.items() <= dataclasses.asdict(watch.statuses()[0]).items())
    return watch.statuses()[0]


async def started(models: Models) -> ModelWatch:
    aliases = {"emoji": ("dall-e-2",)}
    watch = ModelWatch(models.list_models, models.ask, models.wake, aliases, clock)
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
    models.response = ModelStatus(replace(EMOJI, aliases=("gpt-image-1",)), ready=True)
    watch = await started(models)
    loading = [status.capabilities.aliases for status in watch.statuses()]
    models.loaded.set()

    assert loading == [("dall-e-2",), ()]
    loaded = await told(watch, ready=True)
    assert loaded.capabilities.aliases == ("gpt-image-1",)


async def test_a_model_that_is_to_be_compiled_says_so_while_it_loads() -> None:
    models = Models()
    models.listed["quick"] = Listed()
    watch = ModelWatch(models.list_models, models.ask, models.wake, {}, clock, {"emoji"})
    await watch.start()
    assert [status.detail for status in watch.statuses()] == [COMPILING, LOADING]
    await pass_time(SILENCE_S)
    assert [status.detail for status in watch.statuses()] == [COMPILING, LOADING]
    models.loaded.set()
    await told(watch, ready=True, detail="")


async def test_models_are_seldom_listed_while_nothing_changes() -> None:
    models = Models()
    models.loaded.set()
    watch = await started(models)
    await pass_time(6 * STEADY_LISTING_S)
    # While anything changes it would be five times as many.
    assert models.looks <= 7
    # A model that nobody has heard of may be new.
    models.listed["pizza"] = Listed()
    assert await watch.status("pizza") == READY
    models.response = replace(READY, detail="draining")
    await told(watch, detail="draining")
    looks = models.looks
    await pass_time(6 * STEADY_LISTING_S)
    assert models.looks > looks + 25


async def test_who_loads_is_told_at_once_among_all_and_waited_for_when_named() -> None:
    model = Models()
    watch = await started(model)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "loading")]

    naming = [asyncio.create_task(watch.status("emoji")) for _ in range(8)]
    await asyncio.sleep(0)
    model.loaded.set()
    assert [status.ready for status in await asyncio.gather(*naming) if status] == [True] * 8


async def test_who_is_cancelled_while_it_waits_stops_no_other() -> None:
    model = Models()
    watch = await started(model)
    leaving, staying = (asyncio.create_task(watch.status("emoji")) for _ in range(2))
    await asyncio.sleep(0)
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


async def test_a_model_that_loads_is_asked_more_often() -> None:
    """Who waits for it should hear at once that it is there."""
    model = Models()
    watch = await started(model)
    model.loaded.set()
    began_s = clock()
    await told(watch, ready=True)
    assert clock() - began_s < 1.1 * LOADING_INTERVAL_S


async def test_what_a_replica_says_of_itself_is_told_and_its_limits_stay_known() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.response = ModelStatus(EMOJI, ready=False, detail="draining")
    await told(watch, ready=False, detail="draining")
    model.response = READY
    await told(watch, ready=True, detail="")


@pytest.mark.parametrize("error", [RayActorError(), KeyError("does not exist."), ValueError()])
async def test_a_model_is_asked_again_whatever_became_of_the_question(error: Exception) -> None:
    model = Models()
    model.loaded.set()
    model.response = error
    watch = await started(model)
    await told(watch, ready=False, detail="loading")
    asked = model.asked
    model.response = READY
    await told(watch, ready=True)
    assert model.asked > asked


async def test_models_are_listed_again_whatever_became_of_the_last_time() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.list_error = TypeError()
    looks = model.looks
    await until(lambda: model.looks >= looks + 2)
    model.list_error = None
    model.listed["pizza"] = Listed()
    await until(lambda: len(watch.statuses()) == 2)


@pytest.mark.parametrize("error", [RayActorError(), ValueError()])
async def test_a_first_listing_that_fails_keeps_nobody_from_starting(error: Exception) -> None:
    """As while Ray Serve's controller is replaced: an ingress that raised would not be."""
    models = Models()
    models.loaded.set()
    models.list_error = error
    watch = await started(models)
    assert watch.statuses() == []
    models.list_error = None
    assert await watch.status("emoji") is None
    await pass_time(PROBE_INTERVAL_S)
    assert await watch.status("emoji") == READY


async def test_a_short_silence_keeps_nobody_out() -> None:
    model = Models()
    model.loaded.set()
    watch = await started(model)
    model.response = RayActorError()
    await pass_time(0.9 * SILENCE_S)
    assert watch.statuses() == [READY]
    status = await told(watch, ready=False, detail="loading")
    assert status.is_known
    model.response = READY
    await told(watch, ready=True, detail="")


async def test_models_come_and_go() -> None:
    models = Models()
    models.loaded.set()
    watch = await started(models)
    models.listed["sd"] = Listed()
    await until(lambda: len(watch.statuses()) == 2)
    del models.listed["emoji"]
    await until(lambda: len(watch.statuses()) == 1)
    assert await watch.status("emoji") is None
    assert await watch.status("sd") == READY


async def test_a_model_that_was_given_up_says_why_whatever_it_answers() -> None:
    models = Models()
    models.loaded.set()
    models.listed["emoji"] = Listed(failure="failed: out of memory")
    watch = await started(models)
    # Replicas of before may still run requests: to be asked tells them that somebody waits.
    await until(lambda: models.asked >= 3)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "failed: out of memory")]


async def test_a_sleeping_model_takes_requests_and_is_not_woken_by_questions() -> None:
    models = Models()
    models.loaded.set()
    models.response = replace(READY, capabilities=replace(EMOJI, load_s=12.3))
    watch = await started(models)
    models.listed["emoji"] = Listed(asleep=True)
    detail = "asleep: the next request waits 12 s for it"
    await told(watch, ready=True, detail=detail)
    asked = models.asked
    await pass_time(60)
    assert models.asked == asked

    models.loaded.clear()
    models.listed["emoji"] = Listed()
    await told(watch, ready=True, detail="waking up")
    models.loaded.set()
    await told(watch, ready=True, detail="")


async def test_a_sleeping_model_that_was_never_seen_is_woken_once_to_tell_its_limits() -> None:
    """As after a restart of the ingress: without them no request of it could be taken."""
    models = Models()
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    assert [(s.ready, s.detail) for s in watch.statuses()] == [(False, "loading")]
    models.loaded.set()
    await told(watch, ready=True, detail="asleep")
    await pass_time(60)
    assert (models.woken, models.asked) == (1, 1)


async def test_a_sleeping_model_that_cannot_be_loaded_is_not_woken_again_and_again() -> None:
    models = Models()
    models.loaded.set()
    models.response = unknown_status("emoji", "cannot be loaded: no weights")
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    await told(watch, ready=False, detail="cannot be loaded: no weights")
    await pass_time(60)
    assert models.woken == 1

    models.response = RayActorError()
    models.listed["emoji"] = Listed()
    await told(watch, ready=False, detail="loading")
    models.listed["emoji"] = Listed(asleep=True)
    await told(watch, ready=False, detail="cannot be loaded: no weights")
    assert models.woken == 1


async def test_a_sleeping_model_that_cannot_be_woken_is_tried_again() -> None:
    models = Models()
    models.loaded.set()
    models.response = RayActorError()
    models.listed["emoji"] = Listed(asleep=True)
    watch = await started(models)
    await told(watch, ready=False, detail="loading")
    models.response = READY
    await told(watch, ready=True, detail="asleep")


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
