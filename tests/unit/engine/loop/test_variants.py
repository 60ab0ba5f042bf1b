from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch
from engine_fakes import Ear, FakeClock, make_parkable, make_track
from stepserve.engine.calls.call import VariantRows
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.tracks.track import Track
from torch import Tensor, nn


class Switched(nn.Module):
    """Returns what it was set to, and keeps what that was at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.variant: Hashable = "nothing yet"
        self.forwards: list[tuple[Hashable, int]] = []
        self.told: list[list[VariantRows]] = []

    def enter(self, rows: Sequence[VariantRows]) -> None:
        self.told.append([*rows])
        if len({variant for variant, _ in rows}) > 1:
            self.variant = "mixed"
            return
        (self.variant,) = {variant for variant, _ in rows}
        if self.variant == "broken":
            raise ValueError("no such variant")

    def forward(self, sample: Tensor) -> tuple[Tensor, Hashable]:
        self.forwards.append((self.variant, sample.shape[0]))
        return sample * 2, str(self.variant)


def serve(make: Callable[[Switched], list[Track]], bucket_rows: tuple[int, ...] = ()) -> Switched:
    module, clock = Switched(), FakeClock()
    make_parkable(
        module,
        "module",
        "forward",
        stage="denoise",
        enter=module.enter,
        bucket_rows=bucket_rows,
    )
    batcher = Batcher(clock=clock)
    for track in make(module):
        batcher.scheduler.add(replace(track, clock=clock))
    while batcher.tick():
        pass
    return module


def track_for(module: Switched, name: str, variant: Hashable, isolated: bool = False) -> Track:
    def run() -> list[object]:
        return [module(torch.ones(2, 4))[1] for _ in range(3)]

    return replace(make_track(run, name=name), variant=variant, isolated=isolated)


def answers(tracks: list[Track]) -> list[object]:
    ears = [track.listener for track in tracks]
    assert all(isinstance(ear, Ear) for ear in ears)
    return [ear.result for ear in ears if isinstance(ear, Ear)]


def test_each_forward_finds_the_module_set_to_the_variant_of_its_calls() -> None:
    tracks: list[Track] = []

    def make(module: Switched) -> list[Track]:
        tracks.extend(track_for(module, str(i), v) for i, v in enumerate(["a", None, "b", "a"]))
        return tracks

    module = serve(make)
    assert answers(tracks) == [["a"] * 3, ["None"] * 3, ["b"] * 3, ["a"] * 3]
    assert sorted(module.forwards, key=str) == sorted([("a", 4), (None, 2), ("b", 2)] * 3, key=str)


def test_isolated_work_is_given_its_own_variant_and_shares_with_nobody() -> None:
    tracks: list[Track] = []

    def make(module: Switched) -> list[Track]:
        tracks.extend(track_for(module, str(i), "a", isolated=i > 0) for i in range(3))
        return tracks

    module = serve(make)
    assert module.forwards == [("a", 2)] * 9
    assert answers(tracks) == [["a"] * 3] * 3


def test_a_variant_that_cannot_be_entered_ends_only_those_that_want_it() -> None:
    tracks: list[Track] = []

    def make(module: Switched) -> list[Track]:
        tracks.extend(track_for(module, str(i), v) for i, v in enumerate(["a", "broken", "broken"]))
        return tracks

    serve(make)
    assert answers(tracks) == [["a"] * 3, None, None]
    assert [str(track.listener.error) for track in tracks[1:]] == ["no such variant"] * 2  # type: ignore[attr-defined]


def test_the_module_is_told_what_the_rows_of_each_call_want_and_those_that_fill_up() -> None:
    def make(module: Switched) -> list[Track]:
        wanted = ["a", None, "b", "a", "alone"]
        return [
            replace(track_for(module, str(i), v), can_mix=partial(bool, v != "alone"))
            for i, v in enumerate(wanted)
        ]

    module = serve(make, bucket_rows=(4, 12))
    mixed = [("a", 2), (None, 2), ("b", 2), ("a", 2), ("a", 4)]
    assert sorted(module.told, key=len) == [[("alone", 2), ("alone", 2)]] * 3 + [mixed] * 3


def test_mixable_variants_are_one_kind() -> None:
    module = Switched()
    tracks = [track_for(module, str(i), v) for i, v in enumerate([None, "a", "b"])]
    assert len({track.kind for track in tracks}) == 3
    mixable = [replace(track, can_mix=partial(bool, True)) for track in tracks]
    assert len({track.kind for track in mixable}) == 1
    isolated = [replace(track, isolated=True) for track in mixable]
    assert len({track.kind for track in isolated}) == 3
