"""How the processes of the service log."""

from __future__ import annotations

from stepserve.config import TelemetrySettings
from stepserve.telemetry.logs import LogOptions, set_up_logging


def start_logging(settings: TelemetrySettings) -> None:
    """Let this process log as the operator wants."""
    set_up_logging(LogOptions(settings.log_format, settings.log_level))
