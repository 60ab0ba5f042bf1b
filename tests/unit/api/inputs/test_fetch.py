"""Images by address, against real servers; the guard against names is tried with a fake resolver.

The tests' own servers are on the loopback address, which nobody may be led to but here.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest
from stepserve.api.inputs import fetch
from stepserve.api.inputs.fetch import FetchTurns, GuardedBackend, fetch_image, is_public, resolve
from stepserve.config import UploadSettings
from stepserve.domain.errors import InvalidRequestError, ServerFullError

LIMITS = UploadSettings(urls=True, max_bytes=1000, fetch_timeout_s=5)
FILE = b"an image"


@dataclass
class Site:
    """What a server answers by path, and what it was asked."""

    port: int = 0
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str = "/image", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.end_headers()
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"x" * 5000)
            elif self.path == "/slow":
                self.send_response(200)
                self.send_header("Content-Length", "10")
                self.end_headers()
                self.wfile.write(b"x")
                self.wfile.flush()
                site.release.wait(10)
            else:
                self.send_response(200 if self.path == "/image" else 404)
                self.send_header("Content-Length", str(len(FILE)))
                self.end_headers()
                self.wfile.write(FILE)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def serving(site: Site) -> Iterator[Site]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site)) as server:
        site.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield site
        site.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    yield from serving(Site())


@pytest.fixture
def inner_site() -> Iterator[Site]:
    """What only this machine is to reach."""
    yield from serving(Site())


def loopback_only(address: str) -> bool:
    return address == "127.0.0.1"


async def fetched(url: str, limits: UploadSettings = LIMITS) -> bytes:
    return await fetch_image(url, "image", limits, allow=loopback_only)


async def refusal(
    url: str, limits: UploadSettings = LIMITS, **guards: Callable[..., object]
) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        await fetch_image(url, "image", limits, **({"allow": loopback_only} | guards))  # type: ignore[arg-type]
    assert refused.value.field == "image"
    return refused.value.message


async def test_a_image_is_fetched(site: Site):
    assert await fetched(site.url()) == FILE

    [(path, headers)] = site.asked
    assert path == "/image"
    assert headers["host"] == f"127.0.0.1:{site.port}"
    assert headers["user-agent"].startswith("stepserve/")
    assert not {"cookie", "authorization", "referer"} & set(headers)


async def test_nothing_is_fetched_by_default(site: Site):
    message = await refusal(site.url(), UploadSettings())

    assert "this server fetches no addresses" in message
    assert site.asked == []


async def test_data_urls_need_no_permission():
    url = f"data:image/webp;base64,{base64.b64encode(FILE).decode()}"

    assert await fetch_image(url, "image", UploadSettings(urls=False)) == FILE


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png;base64", "must be written as 'data:image/png;base64,'"),
        ("data:" + "x" * 600 + ",aaaa", "must be written as"),
        ("data:image/png," + "a" * 2**21, "write it in base64"),
        ("data:image/png;base64,a", "wrong base64"),
        ("data:image/png;base64,aa=aa", "wrong base64"),
        ("data:image/png;base64,\xe4aaa", "wrong base64"),
        ("cat.PNG", "a form sends the file itself with curl -F image=@image.png"),
        ("@cat.jpg", "curl -F image=@image.png"),
        ("//127.0.0.1/image", "must be a 'data:' URL, an address or an image file in base64"),
    ],
)
async def test_wrong_data_urls(url: str, problem: str):
    assert problem in await refusal(url)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/image",
        "gopher://127.0.0.1/",
        "http://",
        "http:///image",
    ],
)
async def test_only_http(url: str):
    assert "must be at a public 'http:' or 'https:' address" in await refusal(url)


@pytest.mark.parametrize("user", ["user:pass", "user", ":pass", ""])
async def test_no_credentials(site: Site, user: str):
    message = await refusal(site.url(host=f"{user}@127.0.0.1"))

    assert "without credentials" in message
    assert site.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:port/",
        "http://bücher.invalid/",
        "http://127.0.0.1/\u2028",
        "http://a b/",
        "http://127.0.0.1:1/\r\nHost: x",
    ],
)
async def test_addresses_that_are_none_are_told_as_wrong(url: str):
    assert "image" in await refusal(url, resolver=resolve_to("127.0.0.1"))


async def test_a_real_name_is_resolved():
    assert set(await resolve("localhost", 80)) & {"127.0.0.1", "::1"}


def resolve_to(*addresses: str) -> Callable[..., object]:
    async def resolver(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolver


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/image",
        "http://localhost:{port}/image",
        "http://127.1:{port}/image",
        "http://2130706433:{port}/image",
        "http://0x7f.0.0.1:{port}/image",
        "http://0.0.0.0:{port}/image",
        "http://[::ffff:127.0.0.1]:{port}/image",
    ],
)
async def test_this_machine_is_not_fetched_from_however_it_is_written(site: Site, url: str):
    """The real guard and the real resolver."""
    await refusal(url.format(port=site.port), allow=is_public, resolver=resolve)

    assert site.asked == []


async def test_one_forbidden_address_of_a_name_is_enough(site: Site):
    resolver = resolve_to("127.0.0.1", "10.0.0.1")

    assert "public" in await refusal(site.url(host="name.invalid"), resolver=resolver)
    assert "public" in await refusal(site.url(host="name.invalid"), resolver=resolve_to())
    assert site.asked == []


async def test_a_name_that_means_something_else_a_moment_later_is_asked_once(site: Site):
    """The address that was checked is the one that is connected to."""
    responses = iter([["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(responses)

    url = site.url(host="name.invalid")
    file = await fetch_image(url, "image", LIMITS, resolver=rebinding, allow=loopback_only)

    assert file == FILE
    assert site.asked[0][1]["host"] == f"name.invalid:{site.port}"


async def test_a_name_is_checked_anew_for_every_redirect(site: Site):
    site.redirects["/image"] = "/again"
    site.redirects["/again"] = site.url("/inner", host="name.invalid")
    responses = iter([["127.0.0.1"], ["127.0.0.1"], ["10.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(responses)

    message = await refusal(site.url(host="other.invalid"), resolver=rebinding)

    assert "public" in message
    assert [path for path, _ in site.asked] == ["/image", "/again"]


async def test_the_next_address_is_tried_where_one_does_not_answer(site: Site):
    def allow(address: str) -> bool:
        return address in ("127.0.0.1", "127.0.0.2")

    backend = GuardedBackend(resolve_to("127.0.0.2", "127.0.0.1"), allow)  # type: ignore[arg-type]
    stream = await backend.connect_tcp("name.invalid", site.port)
    await stream.aclose()
    with pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("name.invalid", closed_port())


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        return int(closing.getsockname()[1])


@pytest.mark.parametrize("hops", [1, fetch.MAX_REDIRECTS])
async def test_redirects_are_followed(site: Site, hops: int):
    site.redirects = {f"/{n}": f"/{n - 1}" for n in range(2, hops + 1)} | {"/1": "/image"}

    assert await fetched(site.url(f"/{hops}")) == FILE


async def test_but_not_for_ever(site: Site):
    site.redirects["/loop"] = "/loop"

    assert await refusal(site.url("/loop")) == "image is redirected more than 3 times"
    assert len(site.asked) == fetch.MAX_REDIRECTS + 1


async def test_a_redirect_to_where_nobody_may_go(site: Site, inner_site: Site):
    """The first address is allowed; what it leads to could be reached, and is not."""
    verdicts = iter([True, False])
    site.redirects["/image"] = inner_site.url()
    message = await refusal(site.url(), allow=lambda address: next(verdicts))

    # Where it leads is not told: it may be a place that only this server knows.
    assert f":{inner_site.port}" not in message
    assert "public" in message
    assert len(site.asked) == 1
    assert inner_site.asked == []


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "data:image/png;base64,aaaa", "http://user@127.0.0.1/", "ftp:x"],
)
async def test_a_redirect_to_something_else(site: Site, target: str):
    site.redirects["/image"] = target

    assert "must be at a public" in await refusal(site.url())


async def test_a_file_that_is_too_long(site: Site):
    message = await refusal(site.url("/endless"))

    assert "is longer than the limit of 1000 bytes" in message


async def test_a_file_that_takes_too_long(site: Site):
    limits = UploadSettings(urls=True, fetch_timeout_s=0.2)

    assert await refusal(site.url("/slow"), limits) == "image did not arrive within 0.2 s"


async def test_a_file_that_is_not_there(site: Site):
    assert "status 404" in await refusal(site.url("/missing"))


async def test_a_server_that_is_not_there():
    assert "cannot be fetched from" in await refusal(f"http://127.0.0.1:{closed_port()}/")


async def test_a_server_that_speaks_no_http():
    def hang_up(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        message = await refusal(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()

    assert "cannot be fetched from" in message


async def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")

    assert await fetched(site.url()) == FILE


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "2002:0a00:0001::",
        "2002:7f00:0001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "ff0e::1",
        "4000::1",
        "168.63.129.16",
        "::ffff:168.63.129.16",
        "2002:a83f:8110::",
    ],
)
def test_addresses_that_are_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address: str):
    assert is_public(address)


async def test_a_path_is_no_address_of_a_file():
    assert await fetch_image("/etc/passwd", "image", LIMITS) == base64.b64decode("/etc/passwd=")


async def test_an_address_of_any_length_is_no_address(site: Site):
    assert "the limit is 8192" in await refusal(site.url("/image?" + "x" * 10_000))


async def test_only_so_many_requests_fetch_at_once_and_each_waits_its_turn():
    turns = FetchTurns(most=2)
    fetching, most = 0, 0

    async def fetch() -> None:
        nonlocal fetching, most
        async with turns.turn(wait_s=30):
            fetching += 1
            most = max(most, fetching)
            await asyncio.sleep(0)
            fetching -= 1

    await asyncio.gather(*(fetch() for _ in range(20)))
    assert (fetching, most) == (0, 2)


async def test_who_gets_no_turn_in_time_is_told_to_come_again():
    turns = FetchTurns(most=1)
    async with turns.turn(wait_s=30):
        with pytest.raises(ServerFullError, match="1 requests are fetching images"):
            async with turns.turn(wait_s=0):
                pytest.fail("there is a turn too many")
    async with turns.turn(wait_s=0.1):
        pass


async def test_slow_names_keep_no_thread_of_others(monkeypatch: pytest.MonkeyPatch):
    free = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: free.wait(10) and [])
    resolving = [asyncio.create_task(resolve("slow.example", 80)) for _ in range(40)]
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 5) == 7
    finally:
        free.set()
    assert await asyncio.gather(*resolving) == [[]] * 40
