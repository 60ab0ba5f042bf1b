from __future__ import annotations

from typing import Any, cast

import torch
from engine_fakes import Ear, FakeClock, make_parkable
from stepserve.engine.calls.output_cache import OutputCache, content_key
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.tracks.track import Phase, Track
from torch import Tensor, nn


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, tokens: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        self.runs += 1
        return (tokens * scale,)


@torch.no_grad()
def serve(module: Counting, *tokens: Tensor, variant: str | None = None) -> list[Tensor]:
    """Each in a track of its own, one after another, without gradients as in the engine."""
    outputs: list[Tensor] = []
    batcher = Batcher(clock=FakeClock())
    for index, value in enumerate(tokens):

        def run(value: Tensor = value) -> None:
            outputs.append(module(value)[0])

        track = Track(str(index), 1, (Phase(1),), 1, run, Ear(), variant, clock=batcher.clock)
        batcher.scheduler.add(track)
        while batcher.tick():
            pass
    return outputs


def test_a_call_seen_before_is_answered_without_a_forward() -> None:
    module = Counting()
    make_parkable(module, "text_encoder", "forward", stage="encode", output_cache=OutputCache(1000))
    first, other, again = serve(module, torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1, 3))
    assert module.runs == 2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_writing_into_an_answer_spoils_nobody_elses() -> None:
    module = Counting()
    make_parkable(module, "text_encoder", "forward", stage="encode", output_cache=OutputCache(1000))
    for _ in range(3):
        (output,) = serve(module, torch.ones(1, 3))
        assert torch.equal(output, torch.ones(1, 3))
        output.fill_(7)
    assert module.runs == 1


def test_another_adapter_is_another_answer() -> None:
    module = Counting()
    make_parkable(module, "text_encoder", "forward", stage="encode", output_cache=OutputCache(1000))
    serve(module, torch.ones(1, 3))
    serve(module, torch.ones(1, 3), variant="adapter")
    assert module.runs == 2


def test_a_call_that_wants_gradients_runs_itself() -> None:
    module = Counting()
    make_parkable(module, "text_encoder", "forward", stage="encode", output_cache=OutputCache(1000))
    tokens = torch.ones(1, 3, requires_grad=True)
    serve(module, tokens)
    with torch.enable_grad():
        outputs = cast(Any, serve).__wrapped__(module, tokens, tokens)
    assert module.runs == 3
    assert all(output.requires_grad for output in outputs)


def test_it_holds_no_more_than_it_may_and_forgets_the_least_used() -> None:
    cache = OutputCache(max_bytes=2 * 4 * 3)
    keys = [content_key(None, (torch.full((3,), float(i)),), {}) for i in range(3)]
    cache.keep(keys[0], torch.zeros(3))
    cache.keep(keys[1], torch.ones(3))
    assert cache.find(keys[0])[0]
    cache.keep(keys[2], torch.ones(3))
    assert [cache.find(key)[0] for key in keys] == [True, False, True]
    assert cache.held_bytes == 2 * 4 * 3
    cache.keep("larger than all", torch.zeros(100))
    assert not cache.find("larger than all")[0]
    assert cache.held_bytes == 2 * 4 * 3


def test_keys_differ_with_any_bit_dtype_and_setting() -> None:
    one = content_key(None, (torch.ones(2),), {"scale": 1.0})
    assert one == content_key(None, (torch.ones(2),), {"scale": 1.0})
    others = [
        content_key(None, (torch.tensor([1.0, 1.0000001]),), {"scale": 1.0}),
        content_key(None, (torch.ones(2).double(),), {"scale": 1.0}),
        content_key(None, (torch.ones(2),), {"scale": 2.0}),
        content_key("adapter", (torch.ones(2),), {"scale": 1.0}),
    ]
    assert one not in others
