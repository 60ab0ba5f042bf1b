"""Images as links: kept, signed, expired and swept."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from api_fakes import FakeBackend
from stepserve.api.results import store as results
from stepserve.api.results.space import ResultsUnavailableError
from stepserve.api.results.store import (
    LinkExpiredError,
    ResultNotFoundError,
    ResultStore,
    StoreUnusableError,
    WrongSignatureError,
    expired,
    open_store,
)

SECRET = "a secret of sixteen"

URL = "/v1/images/generations"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["local", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "r") if request.param == "local" else f"memory://{tmp_path}"


def parts_of(link: str) -> tuple[str, str]:
    split = urlsplit(link)
    return split.path.rsplit("/", 1)[-1], parse_qs(split.query)["signature"][0]


async def test_what_is_kept_is_found_by_its_link_alone(address: str):
    clock = Clock()
    store = ResultStore(address, 60, b"s", clock)
    name, signature = parts_of(await store.put(b"png", "image/png"))
    other, _ = parts_of(await store.put(b"png", "image/png"))

    assert await store.get(name, signature) == (b"png", "image/png", 60)
    assert name != other
    for wrong in ("", "é", signature[:-1], "0" * 64):
        with pytest.raises(WrongSignatureError):
            await store.get(name, wrong)
    with pytest.raises(WrongSignatureError):
        await store.get(other, signature)


async def test_a_later_expiry_cannot_be_claimed(address: str):
    clock = Clock()
    store = ResultStore(address, 60, b"s", clock)
    name, signature = parts_of(await store.put(b"png", "image/png"))
    clock.now += 61

    with pytest.raises(LinkExpiredError):
        await store.get(name, signature)
    with pytest.raises(WrongSignatureError):
        await store.get(name.replace(name.split("-")[0], "1900000000"), signature)


async def test_sweeping_removes_what_has_expired_and_nothing_else(address: str):
    clock = Clock()
    store = ResultStore(address, 60, b"s", clock)
    await store.put(b"old", "image/png")
    clock.now += 50
    name, signature = parts_of(await store.put(b"new", "image/webp"))
    clock.now += 15

    assert await store.sweep() == 1
    assert await store.sweep() == 0
    assert (await store.get(name, signature))[0] == b"new"


async def test_an_empty_store_is_swept(address: str):
    assert await ResultStore(address, 60, b"s").sweep() == 0


def test_only_results_are_swept():
    old = f"1000000000-{'a' * 32}.png"

    assert expired([old, f"{old}.partial", "secret", "notes.txt"], 1.8e9) == [
        old,
        f"{old}.partial",
    ]


def test_replicas_share_a_secret_that_only_the_owner_reads(tmp_path: Path):
    folder = tmp_path / "results"
    signatures = {open_store(str(folder), 60).sign("x") for _ in range(3)}

    assert len(signatures) == 1
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["secret"]


def test_a_remote_store_needs_a_secret():
    with pytest.raises(StoreUnusableError, match=r"results\.secret"):
        open_store("memory://x", 60)
    assert open_store("memory://x", 60, "a secret of sixteen").sign("x")
    with pytest.raises(StoreUnusableError, match="nothing"):
        open_store("nothing://x", 60)


async def test_answers_hold_links_that_work(client: httpx.AsyncClient, backend: FakeBackend):
    body = {"prompt": "cat", "n": 2, "seed": 3, "response_format": "url"}
    response = await client.post(URL, json=body)
    data = response.json()["data"]
    files = [await client.get(image["url"]) for image in data]

    assert [set(image) for image in data] == [{"url", "seed"}] * 2
    assert data[0]["url"].startswith("http://test/v1/results/")
    assert [file.content for file in files] == [b"seed 3", b"seed 4"]
    assert files[0].headers["content-type"] == "image/png"
    assert files[0].headers["x-content-type-options"] == "nosniff"
    # A second may have passed since.
    assert re.fullmatch(r"private, max-age=(60|5\d), immutable", files[0].headers["cache-control"])


@pytest.mark.parametrize("name", ["x.png", "..%2f..%2fetc%2fpasswd", "secret"])
async def test_other_names_are_refused(client: httpx.AsyncClient, name: str):
    response = await client.get(f"/v1/results/{name}?signature=00")

    assert response.status_code in (403, 404)


async def test_streams_hold_links_too(client: httpx.AsyncClient):
    body = {"prompt": "cat", "stream": True, "response_format": "url"}
    response = await client.post(URL, json=body)

    assert '"url":"http://test/v1/results/' in response.text
    assert "b64_json" not in response.text


async def test_head_tells_size_and_type(client: httpx.AsyncClient):
    body = {"prompt": "cat", "seed": 3, "response_format": "url"}
    response = await client.post(URL, json=body)
    link = response.json()["data"][0]["url"]
    head, whole = await client.head(link), await client.get(link)
    wrong = await client.head(link[:-1])

    assert (head.status_code, head.content, wrong.status_code) == (200, b"", 403)
    for name in ("content-type", "content-length", "content-disposition", "cache-control"):
        assert head.headers[name] == whole.headers[name]
    assert head.headers["content-length"] == str(len(whole.content))


async def test_several_replicas_sweep_at_once(address: str):
    clock = Clock()
    replicas = [ResultStore(address, 60, b"s", clock) for _ in range(4)]
    for _ in range(20):
        await replicas[0].put(b"old", "image/png")
    clock.now += 61
    young = parts_of(await replicas[1].put(b"young", "image/png"))
    await asyncio.gather(*(store.sweep() for store in replicas))

    assert await replicas[0].sweep() == 0
    assert (await replicas[2].get(*young))[0] == b"young"


async def test_sweeping_goes_on_when_the_store_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(results, "SWEEP_S", 0)
    in_the_way = tmp_path / "mount"
    in_the_way.touch()
    sweeping = asyncio.create_task(ResultStore(str(in_the_way / "r"), 60, b"s").sweep_for_ever())
    await until(lambda: "could not be removed" in caplog.text)
    in_the_way.unlink()
    old = in_the_way / "r" / f"1000000000-{'a' * 32}.png"
    old.parent.mkdir(parents=True)
    old.touch()
    await until(lambda: not old.exists())

    assert not sweeping.done()
    sweeping.cancel()


@pytest.mark.parametrize("planted", [".", "secret"])
def test_a_secret_that_another_user_could_know_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
):
    (tmp_path / "secret").write_bytes(b"known to somebody else")
    disown(tmp_path / planted, monkeypatch)

    with pytest.raises(StoreUnusableError, match="belongs to another user"):
        open_store(str(tmp_path), 60)


def test_a_secret_that_others_have_read_is_not_used(tmp_path: Path):
    open_store(str(tmp_path), 60)
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(StoreUnusableError, match=r"other users may read .*secret: remove it"):
        open_store(str(tmp_path), 60)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_folder_of_another_user_is_refused_whatever_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str | None
):
    disown(tmp_path, monkeypatch)
    with pytest.raises(StoreUnusableError, match=f"{tmp_path} belongs to another user"):
        open_store(str(tmp_path), 60, secret)


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("mode", [0o777, 0o772])
def test_a_folder_that_others_write_to_is_refused_whatever_the_secret(
    tmp_path: Path, secret: str | None, mode: int
):
    tmp_path.chmod(mode)
    with pytest.raises(StoreUnusableError, match="other users may write to"):
        open_store(str(tmp_path / "results"), 60, secret)
    with pytest.raises(StoreUnusableError, match="other users may write to"):
        open_store(str(tmp_path), 60, secret)


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("there", [False, True])
async def test_images_are_for_their_owner_alone(tmp_path: Path, secret: str | None, there: bool):
    folder = tmp_path / "results"
    if there:
        folder.mkdir(mode=0o755)
    store = open_store(str(folder), 60, secret)
    await store.put(b"an image", "image/png")

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


async def test_a_folder_that_another_user_made_meanwhile_gets_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Temporary folders are cleaned by age while a service runs."""
    folder = tmp_path / "results"
    store = open_store(str(folder), 60, SECRET)
    folder.rmdir()
    folder.mkdir(mode=0o777)
    disown(folder, monkeypatch)
    with pytest.raises(ResultsUnavailableError):
        await store.put(b"an image", "image/png")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("forged", ["of another user", "a link"])
async def test_what_another_user_put_there_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: str
):
    store = open_store(str(tmp_path), 60, SECRET)
    link = await store.put(b"an image", "image/png")
    name, signature = link.removeprefix("/v1/results/").split("?signature=")
    path = tmp_path / name
    if forged == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        disown(path, monkeypatch)
    with pytest.raises(ResultNotFoundError):
        await store.get(name, signature)


def disown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root can give a file away; for others, we are another user than we were."""
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
