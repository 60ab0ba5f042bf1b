"""Decides which request is started next, and whose calls share the next forward."""

from __future__ import annotations

from collections.abc import Container

from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.engine.calls.call import Call
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.policy import Parked, Policy, next_to_start
from stepserve.engine.scheduling.row_limits import RowLimits
from stepserve.engine.tracks.track import Track


class Scheduler:
    """Has the tracks that were added and have not ended. It looks at no tensor, and runs nothing.

    Args:
        row_limit: of one denoiser forward. Tracks are started while their rows fit beside those of
            their kind, so that every started one can take part in every step of it; later ones wait
            their turn. One that is larger than that is started alone. See `policy` for how many
            rows all kinds have together, and for when rows of less urgent tracks do not count.
        row_limits: the same by shape, lowered where sharing failed.
        estimator: what requests and forwards should take.
        policy: decides who goes next.
        one_at_a_time: nobody starts before the one that runs has ended.
    """

    def __init__(
        self,
        row_limit: int,
        row_limits: RowLimits,
        estimator: CompletionEstimator,
        policy: Policy,
        one_at_a_time: bool = False,
    ) -> None:
        self.row_limit = row_limit
        # In the order of submission.
        self.tracks: list[Track] = []
        self._row_limits = row_limits
        self._estimator = estimator
        self._policy = policy
        self._one_at_a_time = one_at_a_time

    @property
    def queued(self) -> list[Track]:
        """Those that were not started."""
        return [track for track in self.tracks if track.state is RequestState.QUEUED]

    @property
    def running(self) -> list[Track]:
        """Those that were started."""
        return [track for track in self.tracks if track.state is RequestState.RUNNING]

    def add(self, track: Track) -> None:
        """Queue a new track."""
        self.tracks.append(track)

    def find(self, key: RequestKey) -> list[Track]:
        """The track of that request, if it is there."""
        return [track for track in self.tracks if track.key == key]

    def expired(self, now_s: float) -> list[Track]:
        """Those whose deadline has passed."""
        return [track for track in self.tracks if track.expires_s <= now_s]

    def remove_ended(self) -> list[Track]:
        """Take out what has ended."""
        ended = [track for track in self.tracks if track.ended]
        if ended:
            self.tracks = [track for track in self.tracks if not track.ended]
        return ended

    def limit_rows(self, rows: int) -> None:
        """Let denoiser forwards have at most so many rows, and start tracks accordingly."""
        self.row_limit = rows
        self._row_limits.denoiser_rows = rows

    def next_to_start(self) -> Track | None:
        """The queued track that is to be started now, if there is room for any."""
        queued = [track for track in self.queued if not track.held]
        if not queued:
            return None
        running = [_rows_of(track) for track in self.running]
        if self._one_at_a_time and running:
            return None
        # Asked at every tick, and at saturation there is none: so when each is due comes later.
        sizes = {_rows_of(track) for track in queued}
        if not any(self._policy.has_room(size, running, self.row_limit) for size in sizes):
            return None
        line = {self._estimator.demand(track): track for track in queued}
        first = next_to_start(list(line), running, self.row_limit, self._policy)
        return None if first is None else line[first]

    def pick(self, busy: Container[Track] = ()) -> list[Track]:
        """The parked tracks whose calls share the next forward; empty if there is none.

        Args:
            busy: those whose calls run already.
        """
        waiting = {
            track.call: track
            for track in self.running
            if track.call is not None and track not in busy
        }
        parked = [
            Parked(call, track.parked_s, self._estimator.demand(track))
            for call, track in waiting.items()
        ]
        group = self._policy.pick(parked, self._forward_s, self._row_limits.limit)
        return [waiting[item.call] for item in group]

    def _forward_s(self, call: Call, rows: int) -> float:
        return self._estimator.cost.predict(call.shape, rows)


def _rows_of(track: Track) -> Demand:
    """The rows that a track takes beside others; when it should end is left out."""
    return Demand(0, track.rows_ahead, 0, track.kind, track.priority)
