"""The bodies of requests: how long one may be and may take, and how many bytes all may be."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from stepserve.api.bodies.content_coding import Inflater
from stepserve.api.errors import (
    MalformedJsonError,
    SlowRequestError,
    TooManyBodiesError,
    UnknownCharsetError,
    UnsupportedMediaTypeError,
)
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import BodyTooLargeError

SMALL_BYTES = 65_536
"""Of a body; so much is not counted, so that requests without images always get in."""

RETRY_S = 1.0
UTF_8 = ("utf-8", "utf8")
JSON = "application/json"
MAX_CONTENT_TYPE_BYTES = 1000
MAX_JSON_VALUES = 5_000
"""Lists and objects and what is in them: each costs many times its length, and may be wrong."""

PART_BYTES = 65_536
"""Of a body: what is not put together with what follows."""


class Held:
    """What is held of one body, and until when it may arrive."""

    def __init__(self, budget: BodyBudget, deadline: asyncio.Timeout) -> None:
        self._budget = budget
        self._deadline = deadline
        self.size_bytes = 0
        self.gave_way = False

    def grow(self, size_bytes: int) -> None:
        """The body is so long by now. Others may have to give way."""
        self._budget.grow(self, size_bytes)

    def give_way(self) -> None:
        """Stop receiving it."""
        self.gave_way = True
        self._deadline.reschedule(asyncio.get_running_loop().time())


class BodyBudget:
    """At most `most_bytes` of bodies that are being received; longest held gives way first.

    Those that have arrived count no more: what becomes of them has limits of its own.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: dict[Held, None] = {}
        self._sum_bytes = 0

    @contextmanager
    def hold(self, deadline: asyncio.Timeout) -> Iterator[Held]:
        """Count one body until the block is left."""
        held = Held(self, deadline)
        try:
            yield held
        finally:
            self._release(held)

    def grow(self, held: Held, size_bytes: int) -> None:
        """Count `held` as so many bytes."""
        counted_bytes = 0 if held.gave_way else max(0, size_bytes - SMALL_BYTES)
        if counted_bytes == held.size_bytes:
            return
        self._held.setdefault(held)
        self._sum_bytes += counted_bytes - held.size_bytes
        held.size_bytes = counted_bytes
        while self._sum_bytes > self._most_bytes:
            longest = next(iter(self._held))
            self._release(longest)
            longest.give_way()

    def _release(self, held: Held) -> None:
        self._held.pop(held, None)
        self._sum_bytes -= held.size_bytes
        held.size_bytes = 0


@dataclass
class Body:
    """What has arrived of a body, in parts, and what it is."""

    limit_bytes: int
    is_json: bool = False
    parts: list[bytearray] = field(default_factory=list)
    size_bytes: int = 0
    values: int = 0

    def add(self, data: bytes) -> None:
        """Another part of it. Short ones become one, as each costs memory of its own.

        Raises:
            BodyTooLargeError: it is longer than the limit.
            MalformedJsonError: it cannot be JSON, or would be very many values.
        """
        self.size_bytes += len(data)
        check_length(self.size_bytes, self.limit_bytes)
        if self.is_json:
            if not self.parts and data.startswith(b"--"):
                raise MalformedJsonError(
                    "the body is a form that is declared as JSON: leave out the header "
                    "Content-Type, which curl -F and other clients set by themselves"
                )
            self.values = check_json(data, self.values)
        if not self.parts or len(self.parts[-1]) >= PART_BYTES:
            self.parts.append(bytearray())
        self.parts[-1] += data


@dataclass(frozen=True)
class BodyReader:
    """Reads whole bodies.

    Args:
        timeout_s: in which a body must arrive.
        budget: of all bodies together.
    """

    timeout_s: float
    budget: BodyBudget

    async def read(self, receive: Receive, inflater: Inflater | None, body: Body) -> None:
        """Read `body` to its end, unfolded.

        Raises:
            BodyTooLargeError: it is too long.
            MalformedBodyError: it is not compressed as it says.
            MalformedJsonError: it is no JSON, but says so.
            SlowRequestError: it did not arrive in time.
            TooManyBodiesError: others were given its room.
            ClientDisconnect: the client left.
        """
        timeout = asyncio.timeout(self.timeout_s)
        with self.budget.hold(timeout) as held:
            try:
                async with timeout:
                    await _read(receive, inflater, body, held)
            except TimeoutError:
                if held.gave_way:
                    message = "too many bytes of bodies are being received; try again"
                    raise TooManyBodiesError(message, RETRY_S) from None
                message = f"the body did not arrive within {self.timeout_s:g} s, which is the limit"
                raise SlowRequestError(message) from None


async def _read(receive: Receive, inflater: Inflater | None, body: Body, held: Held) -> None:
    """Count what arrives: the declared length is only a hint, and chunks declare none."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data = message.get("body", b"")
        body.add(inflater.feed(data) if inflater else data)
        held.grow(body.size_bytes)
        if not message.get("more_body", False):
            if inflater:
                inflater.check_end()
            return


def check_length(size_bytes: int, limit_bytes: int) -> None:
    """Return if a body may be that long.

    Raises:
        BodyTooLargeError: it may not.
    """
    if size_bytes > limit_bytes:
        raise BodyTooLargeError(
            f"the body is {size_bytes} bytes long or more; the limit is {limit_bytes} bytes: send "
            "less, such as smaller images"
        )


def declared_bytes(headers: Headers) -> int:
    """How long a body is said to be; 0 where that is not said, or is no number."""
    declared = headers.get("content-length", "")
    return int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) else 0


def media_type_of(headers: Headers) -> str:
    """What a body says it is; its texts are in UTF-8.

    Raises:
        UnknownCharsetError: they are in another charset. Some of those that Python knows take time
            that grows with the square of the length.
        UnsupportedMediaTypeError: it says far too much.
    """
    given = headers.get("content-type", "")
    if len(given) > MAX_CONTENT_TYPE_BYTES:
        raise UnsupportedMediaTypeError(
            f"Content-Type is {len(given)} bytes long; the limit is {MAX_CONTENT_TYPE_BYTES} bytes"
        )
    # As the reader of forms reads it: if it were read otherwise, some charsets would get in.
    media_type, options = parse_options_header(given)
    charset = options.get(b"charset", b"utf-8").decode("latin-1").strip().lower()
    if charset not in UTF_8:
        raise UnknownCharsetError(f"charset must be 'utf-8', got {shown(charset)}")
    return media_type.decode("latin-1")


def check_json(data: bytes, values: int = 0) -> int:
    """Return how many values there are, with `values` before: lists, objects, what is in them.

    Raises:
        MalformedJsonError: there are very many, or it is not in UTF-8.
    """
    if b"\0" in data:
        # Python's reader would take UTF-16 and UTF-32 as well.
        raise MalformedJsonError("the body is not valid JSON in UTF-8")
    values += sum(data.count(sign) for sign in (b",", b"[", b"{"))
    if values > MAX_JSON_VALUES:
        raise MalformedJsonError(
            f"the body has {values} values or more; the limit is {MAX_JSON_VALUES}"
        )
    return values
