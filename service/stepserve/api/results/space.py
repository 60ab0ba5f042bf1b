"""Whether results can be kept, found out before any work is done for them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from stepserve.domain.checks.trajectory_limits import MAX_TRAJECTORY_BYTES
from stepserve.domain.errors import RefusedError
from stepserve.domain.requests import GenerationRequest

logger = logging.getLogger(__name__)

RETRY_S = 10.0
# Of a file that holds an image: three colours of a byte each, and the parameters.
BYTES_PER_PIXEL = 3
SPARE_BYTES = 4096
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

_WHY = {
    errno.ENOSPC: "there is no room left",
    errno.EDQUOT: "there is no room left",
    errno.EROFS: "the server's storage is read-only",
    errno.EACCES: "the server may not write to its storage",
    errno.EPERM: "the server may not write to its storage",
}


class ResultsUnavailableError(RefusedError):
    """Images cannot be kept as links right now; the message says why, without a path."""


def unavailable(error: BaseException) -> ResultsUnavailableError:
    """What to raise where storage refuses a result."""
    number = error.errno if isinstance(error, OSError) else None
    why = _WHY.get(number or 0, "the server's storage does not work")
    return ResultsUnavailableError(
        f"links to images cannot be made right now, as {why}; ask for images themselves "
        "(response_format 'b64_json'), or try again later",
        RETRY_S,
    )


def needed_bytes(request: GenerationRequest) -> int:
    """Most bytes that the images of a request take as files, with their trajectories."""
    last = request.phases[-1]
    images_bytes = request.n * (last.width * last.height * BYTES_PER_PIXEL + SPARE_BYTES)
    return images_bytes + (0 if request.trajectory is None else MAX_TRAJECTORY_BYTES)


def probe(partial: Path, size_bytes: int) -> None:
    """Make a file of that size, and remove it again.

    Raises:
        OSError: there is no room for it, or no leave to write.
    """
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _reserve(descriptor, size_bytes)
    finally:
        os.close(descriptor)
        partial.unlink(missing_ok=True)


def write_whole(partial: Path, path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under the name of `partial`, then call it `path`.

    Whatever goes wrong, no part of it stays.
    """
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        # Storage that has just turned read-only keeps it; the sweep removes it later.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _reserve(descriptor: int, size_bytes: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        os.write(descriptor, bytes(size_bytes))
        return
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        # Some network file systems cannot say beforehand.
        if error.errno not in UNSUPPORTED:
            raise


class Trouble:
    """Whether storage worked last time, told in the log whenever that changes.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._error: ResultsUnavailableError | None = None
        self._since_s = 0.0

    def clear(self) -> None:
        """Storage took something."""
        if self._error is not None:
            logger.info("results can be kept again")
        self._error = None

    def note(self, error: BaseException) -> ResultsUnavailableError:
        """Storage refused something; returns what to tell of it."""
        if self._error is None:
            logger.error("results cannot be kept: %s: %s", type(error).__name__, error)
        self._error, self._since_s = unavailable(error), self._clock()
        return self._error

    @property
    def unsolved(self) -> bool:
        """Whether the last thing that storage did was to refuse something."""
        return self._error is not None

    @property
    def recent(self) -> ResultsUnavailableError | None:
        """What went wrong so recently that trying again is not yet worth the work."""
        is_recent = self._clock() - self._since_s < RETRY_S
        return self._error if is_recent else None
