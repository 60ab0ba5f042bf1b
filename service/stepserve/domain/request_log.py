"""What became of the requests of one engine: its running ones, and the latest that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stepserve.domain.errors import RequestIdInUseError
from stepserve.domain.events import Event, Finished, Preview, StepFinished
from stepserve.domain.progress import Progress, advance, new_progress
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


@dataclass
class Record:
    """One request: where it stands, all that was heard of it, and when it was to be finished."""

    progress: Progress
    events: dict[int, Event] = field(default_factory=dict)
    heard: int = 0
    expected_at_s: float | None = None

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
        self._records: dict[RequestKey, Record] = {}
        self._ended: deque[Record] = deque()
        self._previews: deque[tuple[Record, int, int]] = deque()
        self._previews_bytes = 0
        self._most_previews_bytes = previews_bytes
        self._most_ended = most_ended

    def open(self, request: GenerationRequest) -> None:
        """Begin a record. The id of a request that has ended may be used again.

        Raises:
            RequestIdInUseError: a request of that id and owner is still at work.
        """
        if self.is_running(request.key):
            raise RequestIdInUseError(
                f"X-Request-ID {request.id!r} names a request that is still at work; "
                "send another, or none",
                "X-Request-ID",
            )
        created = int(self._wall_clock())
        self._records[request.key] = Record(new_progress(request, created))

    def is_running(self, key: RequestKey) -> bool:
        """Whether a request is known and has not ended."""
        record = self._records.get(key)
        return record is not None and not record.progress.ended

    def add(self, key: RequestKey, event: Event) -> None:
        """Note what happened to a request that is at work. Anything else is ignored."""
        if not self.is_running(key):
            return
        record = self._records[key]
        record.progress = advance(record.progress, event)
        if record.progress.expected_s is not None and record.expected_at_s is None:
            record.expected_at_s = self._clock() + record.progress.expected_s
        number = record.keep(_without_images(event) if isinstance(event, Finished) else event)
        if isinstance(event, Preview):
            self._keep_preview(record, number, event)
        if record.progress.ended:
            self._retire(record)

    def progress(self, key: RequestKey) -> Progress | None:
        """Where a request stands now, or None if it is not known."""
        record = self._records.get(key)
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
        record = self._records.get(key)
        if record is None:
            return None
        return [NumberedEvent(n, event) for n, event in record.events.items() if n >= number]

    def _keep_preview(self, record: Record, number: int, preview: Preview) -> None:
        size_bytes = sum(len(image.data) for image in preview.images)
        self._previews.append((record, number, size_bytes))
        self._previews_bytes += size_bytes
        while self._previews_bytes > self._most_previews_bytes:
            oldest, oldest_number, freed_bytes = self._previews.popleft()
            kept = oldest.events.get(oldest_number)
            if isinstance(kept, Preview):
                oldest.events[oldest_number] = replace(kept, images=())
            self._previews_bytes -= freed_bytes

    def _retire(self, record: Record) -> None:
        self._ended.append(record)
        if len(self._ended) > MOST_REPLAYABLE:
            self._ended[-MOST_REPLAYABLE - 1].drop_steps()
        if len(self._ended) > self._most_ended:
            oldest = self._ended.popleft()
            # Its id may have been used again meanwhile.
            if self._records.get(oldest.progress.key) is oldest:
                del self._records[oldest.progress.key]


def _without_images(finished: Finished) -> Finished:
    """The images themselves go to whoever asked for them, and nobody keeps them."""
    return replace(finished, images=tuple(replace(image, data=b"") for image in finished.images))
