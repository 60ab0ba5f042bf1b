"""Run a command that computes with what all others leave of the processors.

It gets a session of its own, whose process group has the id that it was started with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

# A tenth of what a process without niceness gets where both want a core: no wait takes for ever.
NICENESS = 10


def main(command: list[str]) -> None:
    """Become the command."""
    # Shells have what runs behind them ignore Ctrl-C, and all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    # Linux may share processors between sessions first, and niceness counts only within one.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    os.nice(NICENESS)
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
