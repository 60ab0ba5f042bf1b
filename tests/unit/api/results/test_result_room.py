"""A results folder that is full, read-only or broken: refused before work, and told."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from api_fakes import SETTINGS, FakeBackend
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.results.space import ResultsUnavailableError
from stepserve.api.results.store import ResultStore, open_store

URL = "/v1/images/generations"
WANTS_LINK = {"prompt": "cat", "response_format": "url"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return filler


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


@pytest.fixture
def store(small_disk: Path) -> ResultStore:
    return open_store(str(small_disk), 60)


@pytest.fixture
async def linking(backend: FakeBackend, store: ResultStore) -> AsyncIterator[httpx.AsyncClient]:
    access = Access(KeyRing([]), LocalUsage(time.monotonic))
    app = create_app(backend, SETTINGS, store, access)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def refusal(client: httpx.AsyncClient, backend: FakeBackend, why: str) -> None:
    """Asking for a link is refused before any work, and readiness tells."""
    asked = len(backend.requests)
    response = await client.post(URL, json=WANTS_LINK)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "results_unavailable")
    assert why in error["message"]
    assert "b64_json" in error["message"]
    assert int(response.headers["retry-after"]) >= 1
    assert len(backend.requests) == asked
    ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert why in ready.json()["results"]
    assert "/" not in error["message"]


async def test_a_full_folder_is_refused_before_work_and_recovers(
    linking: httpx.AsyncClient, backend: FakeBackend, small_disk: Path
):
    filler = fill(small_disk)
    await refusal(linking, backend, "no room left")
    whole = await linking.post(URL, json={"prompt": "cat"})
    assert whole.status_code == 200
    assert base64.b64decode(whole.json()["data"][0]["b64_json"])

    filler.unlink()
    assert (await linking.post(URL, json=WANTS_LINK)).status_code == 200
    assert (await linking.get("/readyz")).json()["results"] == ""
    assert not list(small_disk.glob("*.partial"))


async def test_a_read_only_folder_is_refused_before_work_and_recovers(
    linking: httpx.AsyncClient, backend: FakeBackend, small_disk: Path
):
    remount(small_disk, "ro")
    await refusal(linking, backend, "read-only")
    remount(small_disk, "rw")
    assert (await linking.post(URL, json=WANTS_LINK)).status_code == 200


async def test_a_folder_that_became_a_file_is_refused(tmp_path: Path):
    folder = tmp_path / "results"
    store = open_store(str(folder), 60)
    (folder / "secret").unlink()
    folder.rmdir()
    folder.write_text("not a folder")
    with pytest.raises(ResultsUnavailableError):
        await store.check()
    with pytest.raises(ResultsUnavailableError):
        await store.put(b"png", "image/png")


async def test_there_must_be_room_for_all_images_of_a_request(store: ResultStore):
    await store.check(200 * 1024)
    with pytest.raises(ResultsUnavailableError, match="no room left"):
        await store.check(300 * 1024)
    await store.check(200 * 1024)


async def test_no_part_of_a_file_stays_where_a_write_fails(store: ResultStore, small_disk: Path):
    with pytest.raises(ResultsUnavailableError):
        await store.put(bytes(300 * 1024), "image/png")
    assert [path.name for path in small_disk.iterdir()] == ["secret"]


async def test_the_store_opens_in_a_full_folder_that_holds_the_secret(small_disk: Path):
    """An ingress that is replaced meanwhile must come up again."""
    signed = open_store(str(small_disk), 60).sign("name")
    fill(small_disk)
    assert open_store(str(small_disk), 60).sign("name") == signed


async def test_other_storage_is_tried_again_a_while_after_it_has_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    now_s = 0.0
    monkeypatch.setattr("stepserve.api.results.store.time.monotonic", lambda: now_s)
    store = ResultStore(f"memory://{tmp_path}", 60, b"s")
    await store.check()
    # What a bucket is to an object store: a file where the prefix should be.
    store._files.pipe_file(store._root, b"in the way")
    with pytest.raises(ResultsUnavailableError):
        await store.put(b"png", "image/png")
    with pytest.raises(ResultsUnavailableError):
        await store.check()
    store._files.rm_file(store._root)
    with pytest.raises(ResultsUnavailableError):
        await store.check()
    now_s = 11.0
    await store.check()
    await store.put(b"png", "image/png")
