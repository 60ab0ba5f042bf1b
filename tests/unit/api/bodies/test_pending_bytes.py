"""Bytes of bodies that are held until their answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from api_fakes import EMOJI, Blocking, FakeBackend, client_for
from hypothesis import given
from hypothesis import strategies as st
from stepserve.api.bodies.pending_bytes import BodyTurns, PendingBytes
from stepserve.config import Settings, UploadSettings
from stepserve.domain.errors import ServerFullError
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.tasks import Task
from test_edits_route import EDITS, drawn_image
from usual_tasks import USUAL_TASKS

LARGE = 100_000


def test_there_is_room_up_to_the_limit_and_again_after_the_end():
    pending = PendingBytes(100)
    with pending.hold() as first:
        first.grow(60)
        with pending.hold() as second:
            with pytest.raises(ServerFullError, match="hold 60 bytes of images, the limit is"):
                second.grow(41)
            second.grow(40)
        assert pending.held_bytes == 60
        first.change(-60)
        first.grow(101)
    assert pending.held_bytes == 0


@given(st.lists(st.integers(0, 60), max_size=20))
def test_never_more_than_the_limit_is_held(sizes: list[int]):
    pending = PendingBytes(100)
    with pending.hold() as hold:
        for size in sizes:
            try:
                hold.grow(size)
            except ServerFullError:
                assert pending.held_bytes + size > 100
            assert pending.held_bytes <= 100


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    tasks = {task: USUAL_TASKS[task] for task in (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE)}
    backend.statuses = [ModelStatus(replace(EMOJI, tasks=tasks), ready=True)]
    return backend


def settings(most_bytes: int) -> Settings:
    return Settings(uploads=UploadSettings(max_pending_bytes=most_bytes))


def padded(size_bytes: int) -> bytes:
    file = drawn_image()
    return file + b"\0" * (size_bytes - len(file))


async def edit(client: httpx.AsyncClient, size_bytes: int) -> httpx.Response:
    return await client.post(EDITS, data={"prompt": "x"}, files={"image": padded(size_bytes)})


@pytest.mark.virtual_time
async def test_a_body_for_which_there_is_no_room_is_refused_and_small_ones_get_in(
    backend: FakeBackend,
):
    backend.generate_with(Blocking())
    async with client_for(backend, settings(3 * LARGE)) as client:
        waiting = [asyncio.create_task(edit(client, LARGE)) for _ in range(2)]
        while len(backend.requests) < 2:
            await asyncio.sleep(0)
        refused = await edit(client, LARGE)
        small = asyncio.create_task(edit(client, 50_000))
        while len(backend.requests) < 3:
            await asyncio.sleep(0)
        for task in [*waiting, small]:
            task.cancel()

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "server_full"
    assert "bytes of images" in refused.json()["error"]["message"]
    assert int(refused.headers["Retry-After"]) >= 1


async def test_answers_give_room(backend: FakeBackend):
    async with client_for(backend, settings(LARGE)) as client:
        responses = [await edit(client, LARGE) for _ in range(3)]
        mistakes = [await client.post(EDITS, content=bytes(2 * LARGE)) for _ in range(3)]
        last = await edit(client, LARGE)

    assert [response.status_code for response in responses] == [200] * 3
    assert [response.status_code for response in mistakes] == [415] * 3
    assert last.status_code == 200


async def test_long_bodies_come_one_after_another():
    turns, at_once, most = BodyTurns(100, quiet_s=30), 0, 0

    async def send(size_bytes: int) -> None:
        nonlocal at_once, most
        async with turns.turn(size_bytes):
            at_once += size_bytes
            most = max(most, at_once)
            await asyncio.sleep(0)
            at_once -= size_bytes

    await asyncio.gather(*(send(40) for _ in range(20)), send(101))
    assert most == 101
    assert at_once == 0


async def test_who_has_waited_for_long_goes_ahead():
    turns = BodyTurns(100, quiet_s=0)
    async with turns.turn(90), turns.turn(90), turns.turn(5):
        pass
    async with asyncio.timeout(5), BodyTurns(100, quiet_s=30).turn(100):
        pass


async def test_long_bodies_that_come_at_once_are_all_served(backend: FakeBackend):
    async with client_for(backend, settings(2 * LARGE)) as client:
        responses = await asyncio.gather(*(edit(client, LARGE) for _ in range(10)))

    assert [response.status_code for response in responses] == [200] * 10
