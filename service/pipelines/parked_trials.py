"""Calls of a stage as small requests of a pipeline make them, to try things with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from service.domain.errors import CancelledError
from service.engine.call import Call, CallKey
from service.engine.track import Stage, Track
from service.pipelines.attach import ParkingOptions, attach
from service.pipelines.self_check import Ear, Trial, trial_work


@contextmanager
def parked_at(
    stage: Stage, pipeline: Any, trials: Sequence[Trial], options: ParkingOptions
) -> Iterator[list[list[Call]]]:
    """The first call of that stage of every trial, by equal keys; the trials end with the block."""
    detach = attach(pipeline, options)
    tracks = [Track(trial_work(i, trial, Ear()), lambda: 0.0) for i, trial in enumerate(trials)]
    try:
        with torch.no_grad():
            for track in tracks:
                _run_to(stage, track)
            groups: dict[CallKey, list[Call]] = defaultdict(list)
            for call in (track.call for track in tracks if track.call is not None):
                groups[call.key].append(call)
            yield list(groups.values())
            for track in tracks:
                track.stop(CancelledError("the trial was about one call only"))
    finally:
        detach()


def _run_to(stage: Stage, track: Track) -> None:
    track.start()
    while track.call is not None and track.call.method.stage != stage:
        track.resume(track.call.method.run(*track.call.args, **track.call.kwargs))
