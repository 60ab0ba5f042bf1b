"""Results in a real S3 API, served on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_fakes import Clock
from stepserve.api.results.store import (
    LinkExpiredError,
    ResultNotFoundError,
    ResultStore,
    open_store,
)

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
moto = pytest.importorskip("moto.server", reason="moto is not installed")

ADDRESS = "s3://images/results"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As an operator points the service at a store: by AWS's own variables."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.mkdir("images")
    yield
    files.rm("images", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def store_of_a_replica(clock: Clock) -> ResultStore:
    # Not the file system object of another replica, which fsspec would hand out again.
    s3fs.S3FileSystem.clear_instance_cache()
    return ResultStore(ADDRESS, 60, b"s", clock)


def parts_of(link: str) -> tuple[str, str]:
    path, signature = link.split("?signature=")
    return path.rsplit("/", 1)[-1], signature


async def test_another_replica_reads_what_one_kept():
    clock = Clock()
    clock.now_s = 1.8e9
    one, other = store_of_a_replica(clock), store_of_a_replica(clock)
    name, signature = parts_of(await one.put(b"image", "image/webp"))

    assert await other.get(name, signature) == (b"image", "image/webp", 60)
    clock.now_s += 60
    with pytest.raises(LinkExpiredError):
        await other.get(name, signature)


async def test_a_replica_sweeps_what_another_kept_since_it_last_looked():
    clock = Clock()
    clock.now_s = 1.8e9
    one, other = store_of_a_replica(clock), store_of_a_replica(clock)
    await one.put(b"first", "image/png")
    assert await other.sweep() == 0
    second = parts_of(await one.put(b"second", "image/png"))
    clock.now_s += 61
    young = parts_of(await one.put(b"young", "image/png"))

    assert await other.sweep() == 2
    assert await one.sweep() == 0
    assert (await other.get(*young))[0] == b"young"
    clock.now_s -= 61
    with pytest.raises(ResultNotFoundError):
        await one.get(*second)


async def test_an_empty_bucket_is_swept():
    assert await store_of_a_replica(Clock()).sweep() == 0


def test_it_is_opened_as_the_settings_say():
    assert open_store(ADDRESS, 60, "a secret of sixteen").sign("x")
