"""What diffusers, transformers and PEFT say while they load, for somebody to look at."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers")


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self._heard.append(record.getMessage())


@contextmanager
def heard_libraries() -> Iterator[list[str]]:
    """Collect warnings of the libraries instead of showing them; whole once the block is left.

    Otherwise the libraries are hushed, as they warn of a lot that is of no interest.
    """
    heard: list[str] = []
    listener = _Listener(heard)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.handlers, logger.propagate = [listener], False
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield heard
    finally:
        for logger, state in zip(loggers, before, strict=True):
            logger.level, logger.handlers, logger.propagate = state
            logger.setLevel(state[0])
        heard.extend(str(warning.message) for warning in said)
