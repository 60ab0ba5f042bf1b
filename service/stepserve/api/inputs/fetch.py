"""Images by address: `data:` always, `http(s):` where the operator allows it, and then guarded.

A server that fetches what it is told to may be led to places that only it can reach. So every
address that a name stands for must be a public one, it is checked when the connection is made (a
name may mean something else a moment later), and so is every address that a redirect leads to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from stepserve import __version__
from stepserve.api.inputs.data_urls import is_address, is_data_url, read_base64, read_data_url
from stepserve.config import UploadSettings
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError, ServerFullError

MAX_REDIRECTS = 3
USER_AGENT = f"stepserve/{__version__}"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_ADDRESS_CHARACTERS = 8192

MAX_FETCHING = 8
"""Requests that fetch at the same time."""

RETRY_S = 2.0

RESOLVERS = ThreadPoolExecutor(MAX_FETCHING, thread_name_prefix="resolve")
"""Names may take long to be found: nobody else must wait for these threads."""

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

OF_THE_HOST = frozenset({ipaddress.IPv4Address("168.63.129.16")})
"""Where virtual machines of Azure reach services of their host, in a range that is public."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]


class AddressNotAllowedError(Exception):
    """The address is not one that images may be fetched from."""


async def resolve(host: str, port: int) -> list[str]:
    """Return every IP address that a name stands for now."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(RESOLVERS, look_up)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Of IPv6 that is global unicast alone: other ranges stand for IPv4 addresses or local ones.
    """
    parsed: Address = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is not None:
            return is_public(str(inner))
        return parsed.is_global and parsed in GLOBAL_UNICAST
    if parsed in OF_THE_HOST:
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


class FetchTurns:
    """Lets so many requests fetch at a time, whoever they are of."""

    def __init__(self, most: int = MAX_FETCHING) -> None:
        self._most = most
        self._free = asyncio.Semaphore(most)

    @contextlib.asynccontextmanager
    async def turn(self, wait_s: float) -> AsyncIterator[None]:
        """Wait for a turn, and keep it until the block is left.

        Raises:
            ServerFullError: there was none within `wait_s` seconds.
        """
        try:
            await asyncio.wait_for(self._free.acquire(), wait_s)
        except TimeoutError:
            raise ServerFullError(
                f"the server is full: {self._most} requests are fetching images, which is the "
                "limit; send the image itself, or try again",
                RETRY_S,
            ) from None
        try:
            yield
        finally:
            self._free.release()


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only: the ones it has checked, not the name again."""

    def __init__(self, resolver: Resolve, allow: Callable[[str], bool]) -> None:
        self._resolve = resolver
        self._allow = allow
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first of the addresses of `host` that answers, if all are allowed."""
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._allow, addresses)):
            raise AddressNotAllowedError(host)
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError):
                return await self._network.connect_tcp(address, port, timeout, local_address)
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address)


def is_elsewhere(address: str) -> bool:
    """Whether an image is not in its address itself."""
    address = address.strip()
    return is_address(address) and not is_data_url(address)


async def fetch_image(
    address: str,
    field: str,
    limits: UploadSettings,
    resolver: Resolve = resolve,
    allow: Callable[[str], bool] = is_public,
) -> bytes:
    """Return the file at an address.

    Args:
        address: a `data:`, `http:` or `https:` URL; or the file itself in base64.
        field: what messages call it.
        resolver: finds the IP addresses of a name.
        allow: whether an IP address may be connected to.

    Raises:
        InvalidRequestError: the address is not allowed, or gives no file within the limits.
    """
    address = address.strip()
    if is_data_url(address):
        return read_data_url(address, field)
    if not is_elsewhere(address):
        return read_base64(address, field)
    if not limits.urls:
        raise InvalidRequestError(
            f"{field} must be a file or a 'data:' URL; this server fetches no addresses, "
            f"got {shown(address)}",
            field,
        )
    try:
        async with asyncio.timeout(limits.fetch_timeout_s):
            return await _fetch(address, field, limits, GuardedBackend(resolver, allow))
    except TimeoutError as error:
        raise InvalidRequestError(
            f"{field} did not arrive within {limits.fetch_timeout_s:g} s", field
        ) from error
    except AddressNotAllowedError as error:
        # As little as possible: what is there is nothing that a caller should learn.
        raise _not_allowed(field, address) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ValueError) as error:
        raise InvalidRequestError(f"{field} cannot be fetched from {shown(address)}", field) from (
            error
        )


async def _fetch(
    address: str, field: str, limits: UploadSettings, backend: GuardedBackend
) -> bytes:
    async with httpcore.AsyncConnectionPool(network_backend=backend, max_connections=1) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            _check_address(address, field)
            headers = [("Host", urlsplit(address).netloc), ("User-Agent", USER_AGENT)]
            async with pool.stream("GET", address, headers=headers) as response:
                if response.status not in REDIRECTS:
                    return await _read(response, field, address, limits.max_bytes)
                received = {name.lower(): value for name, value in response.headers}
            address = urljoin(address, received.get(b"location", b"").decode("latin-1"))
    raise InvalidRequestError(f"{field} is redirected more than {MAX_REDIRECTS} times", field)


async def _read(response: httpcore.Response, field: str, address: str, max_bytes: int) -> bytes:
    if response.status != 200:
        raise InvalidRequestError(
            f"{field} cannot be fetched from {shown(address)}: status {response.status}", field
        )
    content = bytearray()
    async for chunk in response.aiter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise InvalidRequestError(
                f"{field} at {shown(address)} is longer than the limit of {max_bytes} bytes", field
            )
    return bytes(content)


def _check_address(address: str, field: str) -> None:
    if len(address) > MAX_ADDRESS_CHARACTERS:
        raise InvalidRequestError(
            f"{field} is at an address of {len(address)} characters; the limit is "
            f"{MAX_ADDRESS_CHARACTERS}, got {shown(address)}",
            field,
        )
    if not address.isascii():
        raise InvalidRequestError(
            f"{field} must be at an address in ASCII, other signs as %XX, got {shown(address)}",
            field,
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise _not_allowed(field, address)


def _not_allowed(field: str, address: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field} must be at a public 'http:' or 'https:' address without credentials, "
        f"got {shown(address)}",
        field,
    )
