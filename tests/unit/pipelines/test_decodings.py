"""Decodings of several requests in one forward: where bits stay as they are, and it is worth it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from stepserve.domain.events import Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.probing.vae_batching import (
    DecodingRules,
    decoding_rules,
    rows_worth_sharing,
)
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import a_request, submit_all


class Decoder:
    """Takes a time of its own, and mixes rows from some row count on."""

    def __init__(self, fixed_s: float, per_row_s: float, mixes_from: int = 99) -> None:
        self.fixed_s, self.per_row_s, self.mixes_from = fixed_s, per_row_s, mixes_from
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        rows = latents.shape[0]
        self.now_s += self.fixed_s + self.per_row_s * rows
        return latents + (latents.mean() if rows >= self.mixes_from else 0)

    def call(self) -> Call:
        method = ParkableMethod("vae", "decode", self.decode, stage="decode", max_rows=1)
        return make_call(method, (torch.ones(1, 2, 4, 4),), {})


@pytest.mark.parametrize(
    ("decoder", "rows"),
    [
        (Decoder(fixed_s=0.010, per_row_s=0.005), 8),
        (Decoder(fixed_s=0.010, per_row_s=0.005, mixes_from=6), 4),
        (Decoder(fixed_s=0.010, per_row_s=0.005, mixes_from=2), 1),
        # Sharing spares next to nothing, or each by itself takes long.
        (Decoder(fixed_s=0.001, per_row_s=0.010), 1),
        (Decoder(fixed_s=0.200, per_row_s=0.001), 1),
    ],
)
def test_as_many_share_as_keep_their_bits_and_gain(decoder: Decoder, rows: int) -> None:
    assert rows_worth_sharing(decoder.call(), clock=decoder.clock) == rows


def test_only_shapes_that_were_tried_share() -> None:
    call = Decoder(0.01, 0.001).call()
    rules = DecodingRules({call.key.shape: 8})
    assert rules(call).method.max_rows == 8
    assert rules(rules(call)) is not call
    assert rules(rules(call)).method is rules(call).method
    larger = make_call(call.method, (torch.ones(1, 2, 8, 4),), {})
    assert rules(larger).method.max_rows == 1
    step = replace(call, method=replace(call.method, stage="denoise"))
    assert rules(step) is step


@pytest.fixture
def rows_decoded(tiny: LoadedModel) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = tiny.pipeline.vae.decoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0])
    )
    yield seen
    handle.remove()


def test_images_of_several_requests_are_decoded_together_with_the_bytes_of_one(
    tiny: LoadedModel, rows_decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread, as of the replicas that this is for."""
    monkeypatch.setattr("stepserve.pipelines.probing.vae_batching.MOST_OF_ALONE", 10.0)
    runner = PipelineRunner(tiny, EngineOptions(threads=1, max_rows=8))
    runner.start()
    try:
        if not shares_decodings(runner):
            pytest.skip("this CPU rounds otherwise for several images, with one thread too")
        requests = [a_request(id=str(seed), seed=seed) for seed in range(4)]
        other = a_request(id="other", seed=9, width=32, height=32)
        alone = [serve(runner, [request])[0] for request in requests]
        assert set(rows_decoded[-4:]) == {1}
        rows_decoded.clear()
        together = serve(runner, [*requests, other])
        assert sorted(rows_decoded) == [1, 4]
        assert [f.images for f in together[:4]] == [f.images for f in alone]
    finally:
        runner.stop()


def shares_decodings(runner: PipelineRunner) -> bool:
    rules = runner.engine.batcher.execution.adjust
    return isinstance(rules, DecodingRules) and max(rules.rows.values()) >= 4


def serve(runner: PipelineRunner, requests: list[GenerationRequest]) -> list[Finished]:
    # On the engine's thread: so all are there before the first of them starts.
    inboxes = runner.engine.call(partial(submit_all, runner, requests))
    outcomes = [inbox.wait() for inbox in inboxes]
    assert all(isinstance(outcome, Finished) for outcome in outcomes), outcomes
    return outcomes


def test_nothing_is_shared_where_the_decoder_runs_inside_the_call(tiny: LoadedModel) -> None:
    plan = SharingPlan(inline=frozenset({"vae"}))
    with torch.no_grad():
        assert decoding_rules(tiny.pipeline, make_probe_requests(tiny)[0], plan).rows == {}
