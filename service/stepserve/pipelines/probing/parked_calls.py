"""Calls of a stage as small requests of a pipeline make them, to try things with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stepserve.domain.errors import CancelledError
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.sharing import sharing_groups
from stepserve.engine.tracks.track import Stage, Track
from stepserve.pipelines.modules.parking import ParkingOptions, parkable_methods, takes_caches
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules
from stepserve.pipelines.probing.sharing_check import ProbeListener, ProbeRequest, probe_track


@contextmanager
def parked_at(
    stage: Stage, pipeline: Any, probes: Sequence[ProbeRequest], options: ParkingOptions
) -> Iterator[list[list[Call]]]:
    """Groups of calls of that stage that may share a forward.

    Of each probe request there is the first one of every method, and of methods that take caches
    also the second one, which reads what the first has left. The probes end with the block.
    """
    methods = {
        f"{path}.{rule.method}": 2 if takes_caches(module) else 1
        for path, module, rule in parkable_methods(pipeline)
        if rule.stage == stage and path not in options.inline
    }
    unwrap = wrap_modules(pipeline, Wrappers(parking=options))
    tracks = [probe_track(i, probe, ProbeListener()) for i, probe in enumerate(probes)]
    try:
        with torch.no_grad():
            calls = [call for track in tracks for call in _first_calls(track, methods)]
            yield sharing_groups(calls)
    finally:
        for track in tracks:
            track.stop(CancelledError("the probe is about one call only"))
        unwrap()


def _first_calls(track: Track, methods: Mapping[str, int]) -> Iterator[Call]:
    """The first calls of each method, so many; the track is run no further than to the last."""
    left = Counter(methods)
    track.start()
    while left and (call := track.call) is not None:
        if call.method.name in left:
            left -= Counter([call.method.name])
            yield call
        if left:
            track.resume(call.method.run(*call.args, **call.kwargs))
