"""When each ingress was last heard from."""

from __future__ import annotations

from collections.abc import Callable

# A busy machine may keep an ingress from its second-by-second heartbeat for a while. It comes
# every six seconds while another replica of the model is silent.
SILENT_AFTER_S = 10.0


class IngressHeartbeats:
    """Ingress replicas by id. A killed one cancels nothing, so its requests must be cancelled here.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float], silent_after_s: float = SILENT_AFTER_S) -> None:
        self._clock = clock
        self._silent_after_s = silent_after_s
        self._heard_s: dict[str, float] = {}

    def hear(self, ingress: str) -> None:
        """Note a heartbeat, and forget those that fell silent: all that they sent is orphaned."""
        self._heard_s = {i: s for i, s in self._heard_s.items() if not self.is_silent(i)}
        self._heard_s[ingress] = self._clock()

    def is_silent(self, ingress: str) -> bool:
        """Whether an ingress was not heard from for too long, or never."""
        heard_s = self._heard_s.get(ingress)
        return heard_s is None or heard_s < self._clock() - self._silent_after_s
