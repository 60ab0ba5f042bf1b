"""What became of the requests of one engine: those in flight, and the latest that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from stepserve.domain.errors import RequestIdInUseError
from stepserve.domain.events import Event, Finished, Preview, StepFinished
from stepserve.domain.progress import Progress, advance
from stepserve.domain.requests import GenerationRequest, RequestKey

MOST_ENDED = 1000
"""So many ended requests are remembered."""

MOST_REPLAYABLE = 50
"""Of so many ended requests each step is; of older ones the beginning and the end."""

PREVIEWS_BYTES = 32 * 2**20
"""So much of all requests' previews is kept; the oldest go first."""


@dataclass(frozen=True)
class NumberedEvent:
    """An event, and how many of its request came before it."""

    number: int
    event: Event


@dataclass(eq=False)
class RequestRecord:
    """All that a replica knows of one request, from its submission until it is forgotten.

    Args:
        progress: where it stands; `expected_s` counts from its acceptance.
        request: what was asked for; None once it has ended, as it may hold large images.
        ingress: the id of the ingress that waits for it, or empty where that need not be watched.
        events: what happened to it, by number; some may have been dropped.
        heard: how many events there were.
        expected_at_s: when it should be finished, on the log's clock.
        listeners: called with each event, after it was noted.
        is_cancelled: its end was asked for.
        is_orphaned: because its ingress was not heard from any more.
    """

    progress: Progress
    request: GenerationRequest | None
    ingress: str = ""
    events: dict[int, Event] = field(default_factory=dict)
    heard: int = 0
    expected_at_s: float | None = None
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    is_cancelled: bool = False
    is_orphaned: bool = False

    @property
    def key(self) -> RequestKey:
        """Of the request."""
        return self.progress.key

    def keep(self, event: Event) -> int:
        """Note an event and return its number."""
        number = self.heard
        self.events[number] = event
        self.heard += 1
        return number

    def drop_steps(self) -> None:
        """Forget all but the beginning and the end."""
        dropped = [n for n, e in self.events.items() if isinstance(e, StepFinished | Preview)]
        for number in dropped:
            del self.events[number]


class RequestLog:
    """Remembers requests by id and owner. Not thread-safe: for one event loop.

    Args:
        clock: seconds, monotonic.
        wall_clock: Unix time in seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        previews_bytes: int = PREVIEWS_BYTES,
        most_ended: int = MOST_ENDED,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        # Those that ended are in the order of their ends.
        self._records: dict[RequestKey, RequestRecord] = {}
        self._previews: deque[tuple[RequestRecord, int, int]] = deque()
        self._previews_bytes = 0
        self._most_previews_bytes = previews_bytes
        self._most_ended = most_ended

    def open(self, request: GenerationRequest, ingress: str = "") -> RequestRecord:
        """Begin a record. The id of a request that has ended may be used again.

        Raises:
            RequestIdInUseError: a request of that id and owner is still in flight.
        """
        if self.is_in_flight(request.key):
            raise RequestIdInUseError(
                f"X-Request-ID {request.id!r} names a request that is still in flight; "
                "send another, or none",
                "X-Request-ID",
            )
        created, steps = int(self._wall_clock()), request.expected_steps
        progress = Progress(request.id, request.model, request.owner, created, steps=steps)
        record = self._records[request.key] = RequestRecord(progress, request, ingress)
        return record

    def in_flight(self) -> Sequence[RequestRecord]:
        """Every request that has not ended."""
        return [record for record in self._records.values() if not record.progress.ended]

    def is_in_flight(self, key: RequestKey) -> bool:
        """Whether a request is known and has not ended."""
        record = self._records.get(key)
        return record is not None and not record.progress.ended

    def find(self, key: RequestKey) -> RequestRecord | None:
        """What is known of a request, in flight or ended, or None."""
        return self._records.get(key)

    def prompts_of(self, call: RequestKey) -> list[RequestKey]:
        """The requests for the prompts of a call that has several; none of any other."""
        return [key for key in self._records if key.is_prompt_of(call)]

    def add(self, key: RequestKey, event: Event) -> None:
        """Note what happened to a request in flight, and tell its listeners. Else ignored."""
        record = self._records.get(key)
        if record is None or record.progress.ended:
            return
        record.progress = advance(record.progress, event)
        if record.progress.expected_s is not None and record.expected_at_s is None:
            record.expected_at_s = self._clock() + record.progress.expected_s
        number = record.keep(_without_images(event) if isinstance(event, Finished) else event)
        if isinstance(event, Preview):
            self._keep_preview(record, number, event)
        if record.progress.ended:
            self._retire(record)
        for listener in tuple(record.listeners):
            listener(event)

    def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands now, or None if it is not known."""
        record = self.find(key)
        if record is None:
            return None
        if record.progress.ended or record.expected_at_s is None:
            return record.progress
        left_s = max(record.expected_at_s - self._clock(), 0.0)
        return replace(record.progress, expected_s=left_s)

    def events_since(self, key: RequestKey, number: int) -> list[NumberedEvent] | None:
        """The events of a request from `number` on, or None if it is not known.

        Previews whose images were dropped to save memory have none.
        """
        record = self.find(key)
        if record is None:
            return None
        return [NumberedEvent(n, event) for n, event in record.events.items() if n >= number]

    def _keep_preview(self, record: RequestRecord, number: int, preview: Preview) -> None:
        size_bytes = sum(len(image.data) for image in preview.images)
        self._previews.append((record, number, size_bytes))
        self._previews_bytes += size_bytes
        while self._previews_bytes > self._most_previews_bytes:
            oldest, oldest_number, freed_bytes = self._previews.popleft()
            kept = oldest.events.get(oldest_number)
            if isinstance(kept, Preview):
                oldest.events[oldest_number] = replace(kept, images=())
            self._previews_bytes -= freed_bytes

    def _retire(self, record: RequestRecord) -> None:
        record.request = None
        self._records[record.key] = self._records.pop(record.key)
        ended = [record for record in self._records.values() if record.progress.ended]
        if len(ended) > MOST_REPLAYABLE:
            ended[-MOST_REPLAYABLE - 1].drop_steps()
        if len(ended) > self._most_ended:
            del self._records[ended[0].key]


def _without_images(finished: Finished) -> Finished:
    """Finished images are sent, and not kept."""
    images = tuple(replace(image, data=b"", trajectory=None) for image in finished.images)
    return replace(finished, images=images)
