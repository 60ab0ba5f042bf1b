"""Log lines: one JSON object each, or readable ones for a terminal.

What a line says besides its message goes in as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from stepserve.telemetry.log_sink import SinkHandler

FORMAT_VARIABLE = "_STEPSERVE_LOG_FORMAT"
"""Set by a local service for its processes: only its starter knows whether there is a terminal."""

SINK_VARIABLE = "_STEPSERVE_LOG_SINK"
OURS = "stepserve"
DIM, RED, YELLOW, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
COLOURS = {"WARNING": YELLOW, "ERROR": RED, "CRITICAL": RED}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Readable lines, with colours where that helps."""

    def __init__(self, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the lines of an exception."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{key}={_short(value)}" for key, value in _fields(record).items())
        level = self._coloured(f"{record.levelname:7}", COLOURS.get(record.levelname, ""))
        line = f"{clock} {level} {record.getMessage()}"
        if fields:
            line += "  " + self._coloured(fields, DIM)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def _coloured(self, text: str, colour: str) -> str:
        return f"{colour}{text}{PLAIN}" if self._colours and colour else text


def set_up_logging(log_format: str, level: str, environ: Mapping[str, str] | None = None) -> None:
    """Let this process log as the operator wants: to the service that started it, or to stderr.

    Args:
        log_format: see `TelemetrySettings`, as of `level`.
    """
    environ = os.environ if environ is None else environ
    wanted = environ.get(FORMAT_VARIABLE) or resolved_format(log_format, sys.stderr)
    sink = environ.get(SINK_VARIABLE)
    handler = SinkHandler(sink) if sink else logging.StreamHandler()
    handler.setFormatter(make_formatter(wanted))
    ours = logging.getLogger(OURS)
    for former in ours.handlers:
        former.close()
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False


def make_formatter(name: str) -> logging.Formatter:
    """A formatter by name: `json`, `text`, or `colour`, which is text for a terminal."""
    makers: dict[str, Callable[[], logging.Formatter]] = {
        "json": JsonFormatter,
        "text": TextFormatter,
        "colour": lambda: TextFormatter(colours=True),
    }
    return makers[name]()


def resolved_format(name: str, stream: TextIO) -> str:
    """What `auto` means where lines end up in `stream`."""
    if name == "auto":
        return "colour" if stream.isatty() else "json"
    return name


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _utc(created_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created_s))
    return f"{whole}.{int(created_s % 1 * 1000):03d}Z"
