"""Who sent the work in hand, and whether they are still there."""

from __future__ import annotations

from collections.abc import Callable

from stepserve.domain.requests import RequestKey

# A busy machine may keep an ingress from its second-by-second sign of life for a while. It comes
# every six seconds while another replica of the model is silent.
ORPHANED_AFTER_S = 10.0


class IngressHeartbeats:
    """Ingress replicas by id, and the requests that each waits for.

    A killed ingress cancels nothing: what it had asked for would be worked on for nobody.

    Args:
        clock: seconds that only grow.
    """

    def __init__(
        self, clock: Callable[[], float], orphaned_after_s: float = ORPHANED_AFTER_S
    ) -> None:
        self._clock = clock
        self._orphaned_after_s = orphaned_after_s
        self._heard_s: dict[str, float] = {}
        self._requests: dict[RequestKey, str] = {}

    def hear(self, caller: str) -> None:
        """A sign of life."""
        self._heard_s[caller] = self._clock()

    def begin(self, key: RequestKey, caller: str) -> None:
        """A caller waits for a request from now on. Without a name it is trusted to cancel."""
        if caller:
            self._requests[key] = caller
            self.hear(caller)

    def end(self, key: RequestKey) -> None:
        """Nobody waits for a request any more."""
        self._requests.pop(key, None)

    def orphans(self) -> list[RequestKey]:
        """Requests whose caller has been silent for too long."""
        late_s = self._clock() - self._orphaned_after_s
        silent = {caller for caller, heard_s in self._heard_s.items() if heard_s < late_s}
        orphans = [key for key, caller in self._requests.items() if caller in silent]
        for caller in silent - set(self._requests.values()):
            del self._heard_s[caller]
        return orphans
