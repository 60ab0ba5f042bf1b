"""Who hears of forwards and ends, such as metrics and traces."""

from __future__ import annotations

from typing import Protocol

from stepserve.domain.reports import EndReport, ForwardReport


class Observer(Protocol):
    """Hears of forwards and ends on the engine's thread: must return at once, and not raise."""

    def forward_ended(self, report: ForwardReport) -> None:
        """A forward succeeded."""

    def request_ended(self, report: EndReport) -> None:
        """A request ended; its listener was called before."""
