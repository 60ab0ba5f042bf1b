"""How the forwards of one pipeline are to run: found out before it serves, and then fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stepserve.engine.calls.call import Call
from stepserve.engine.loop.side_stream import SideStream
from stepserve.engine.loop.timing import ForwardTiming, WallTiming
from stepserve.engine.tracks.track import Clock


@dataclass(frozen=True)
class Execution:
    """How the forwards of one pipeline run.

    Args:
        row_ceiling: most rows that one shared denoiser forward may ever have; None: what the
            engine's options say.
        row_limit: most rows that it may have until more is measured; None: what each method says.
        one_at_a_time: for pipelines that cannot share: nobody starts before the one that runs has
            ended.
        adjust: gives a call the rows that it needs to keep its bits, where that is not the same
            for all.
        start_timing: begins to time a forward.
        side_stream: where the device decodes beside the steps of others, if it can.
    """

    row_ceiling: int | None = None
    row_limit: int | None = None
    one_at_a_time: bool = False
    adjust: Callable[[Call], Call] | None = None
    start_timing: Callable[[Clock], ForwardTiming] = WallTiming
    side_stream: SideStream | None = None


DEFAULT_EXECUTION = Execution()
